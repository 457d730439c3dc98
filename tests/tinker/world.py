"""A folder in which programs of tinker-cookbook find their models and datasets by the names of the hub.

Both are looked up as folders before the hub is asked, so programs that run in this folder need no network:

    python tests/tinker/world.py FOLDER
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cookbook import embedded

MODELS = ("Qwen/Qwen3-8B", "Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen3.5-9B")
"""Names for which tinker-cookbook knows a renderer. Each is the embedded model, which is a Qwen3."""

Row = Mapping[str, Any]


def make(folder: Path) -> Path:
    """Writes the models and datasets. Returns the folder."""
    for name in MODELS:
        shutil.copytree(embedded.MODEL_PATH, folder / name)
    chats = [{"messages": [_message("user", q), _message("assistant", a)]} for q, a, _ in _sums()]
    _write(folder / "HuggingFaceH4/no_robots", {"train": chats[:256], "test": chats[256:264]})
    _write_rows(folder / "chats.jsonl", chats[:24])
    problems = [{"question": q, "answer": f"{a}\n#### {number}"} for q, a, number in _sums()]
    _write(folder / "openai/gsm8k", {"train": problems[:8], "test": problems[8:12]}, config="main")
    pairs = [
        {
            "chosen": f"\n\nHuman: {q}\n\nAssistant: {a}",
            "rejected": f"\n\nHuman: {q}\n\nAssistant: I will not say.",
        }
        for q, a, _ in _sums()
    ]
    _write(folder / "Anthropic/hh-rlhf", {"train": pairs[:64], "test": pairs[64:80]})
    questions = [{"question": q} for q, _, _ in _sums()]
    _write(folder / "zwhe99/DeepMath-103K", {"train": questions[:128]})
    turns = [
        {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a, _ in _sums()
    ]
    _write(folder / "open-thoughts/OpenThoughts3-1.2M", {"train": turns[:16]})
    _write(folder / "hicai-zju/SciKnowEval", {"test": [_choice_row(*one) for one in _sums()[:16]]})
    return folder


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _sums() -> list[tuple[str, str, int]]:
    """Returns questions, answers, and the numbers that are asked for."""
    rng = random.Random(0)
    numbers = [(rng.randrange(2, 9), rng.randrange(2, 9)) for _ in range(264)]
    return [(f"What is {a} plus {b}?", f"It is {a + b}.", a + b) for a, b in numbers]


def _choice_row(question: str, answer: str, number: int) -> Row:
    return {
        "domain": "Chemistry",
        "details": {"level": "L3"},
        "type": "mcq-2-choices",
        "question": question,
        "choices": {"label": ["A", "B"], "text": [str(number), str(number + 1)]},
        "answerKey": "A",
    }


def _write(folder: Path, splits: Mapping[str, Iterable[Row]], config: str = "default") -> None:
    """Writes a dataset in the form of one of the hub."""
    folder.mkdir(parents=True)
    lines = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    for split, rows in splits.items():
        _write_rows(folder / f"{split}.jsonl", rows)
        lines += [f"  - split: {split}", f"    path: {split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


def _write_rows(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
