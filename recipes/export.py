"""Exports a fine-tuned model.

    python -m recipes.export checkpoint=runs/sft to=exports/adapter
    python -m recipes.export checkpoint=runs/sft to=exports/merged format=merged dtype=bfloat16
    python -m recipes.export checkpoint=runs/sft to=exports/gguf format=gguf
    python -m recipes.export checkpoint=runs/sft to=exports/ollama format=ollama
    python -m recipes.export checkpoint=runs/sft to=hf://owner/name

The checkpoint is not changed.
"""

from __future__ import annotations

from cookbook.config import cli
from cookbook.export.config import ExportConfig


async def export(config: ExportConfig) -> str:
    from cookbook.export.export import main  # imports torch, which help does not need

    return await main(config)


def main(argv: list[str] | None = None) -> str:
    return cli.run(ExportConfig, export, {}, prog="recipes.export", argv=argv)


if __name__ == "__main__":
    main()
