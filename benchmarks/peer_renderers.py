"""Renders conversations with the package `renderers` of the index, for `benchmarks.rendering --peer`.

    .venv-peers-renderers/bin/python -I benchmarks/peer_renderers.py

The first line of its input is an object with `tokenizer`, a folder, `renderer`, a name, and `sets`, lists of
conversations. Each line after that is the number of a set, for which it prints the CPU seconds of rendering
it. The package has the name of this project's own, so this file runs in the environment that `make peers`
makes, and imports nothing of this project.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read at the first use of a tokenizer
os.environ["RAYON_NUM_THREADS"] = "1"


def main() -> None:
    from transformers import AutoTokenizer

    from renderers import configs
    from renderers.base import create_renderer  # type: ignore[attr-defined]

    asked = json.loads(sys.stdin.readline())
    kinds = [kind for kind in vars(configs).values() if hasattr(kind, "model_fields")]
    fields = {kind: kind.model_fields.get("name") for kind in kinds}
    (kind,) = {kind for kind, field in fields.items() if field and field.default == asked["renderer"]}
    renderer = create_renderer(AutoTokenizer.from_pretrained(asked["tokenizer"]), kind())
    for line in sys.stdin:
        started = time.process_time()
        for messages in asked["sets"][int(line)]:
            renderer.render(messages)
        print(time.process_time() - started, flush=True)


if __name__ == "__main__":
    main()
