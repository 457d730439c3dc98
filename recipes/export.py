"""Takes a fine-tuned model away.

    python -m recipes.export checkpoint=runs/sft to=exports/adapter
    python -m recipes.export checkpoint=runs/sft to=exports/merged format=merged dtype=bfloat16
    python -m recipes.export checkpoint=runs/sft to=exports/gguf format=gguf
    python -m recipes.export checkpoint=runs/sft to=exports/ollama format=ollama
    python -m recipes.export checkpoint=runs/sft to=hf://owner/name

The checkpoint stays as it is.
"""

from __future__ import annotations

from cookbook.config import cli
from cookbook.export.export import Config
from cookbook.export.export import main as export


def main(argv: list[str] | None = None) -> str:
    return cli.run(Config, export, {}, prog="recipes.export", argv=argv)


if __name__ == "__main__":
    main()
