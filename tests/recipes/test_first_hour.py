"""docs/first_hour.md: what a newcomer sees is what is printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from cookbook.errors import CookbookError
from recipes import __main__ as console
from recipes import sft

PAGE = (Path(__file__).parents[2] / "docs" / "first_hour.md").read_text(encoding="utf-8")
EXPORT = ["export", "checkpoint=runs/sft", "to=x", "format=gguf"]


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["sfft"], "There is no command 'sfft'. Did you mean `sft`?"),
        (
            ["sft", "lerning_rate=1"],
            "There is no key 'lerning_rate'. Did you mean `learning_rate`? Run with --help to see the keys.",
        ),
        (
            ["sft", "per_device_train_batch_size=4"],
            "There is no key 'per_device_train_batch_size'. `batch_size` counts the conversations of an "
            "optimizer step; `max_tokens_per_microbatch` cuts it up.",
        ),
        (["sft", "config=pirate"], "config=pirate: there is no such file. Did you mean `pirate_tiny`?"),
        (
            [*EXPORT, "gguf_type=q4_k_m"],
            "it takes one of auto, f32, f16, bf16, q8_0. q4_k_m is a value of `gguf_quantize`.",
        ),
    ],
)
def test_a_mistake_is_answered_as_on_the_page(
    argv: Sequence[str], shown: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises((SystemExit, CookbookError)) as caught:
        console.main(argv)
    assert shown in PAGE
    assert shown in capsys.readouterr().err + str(caught.value)


@pytest.mark.slow
def test_a_short_run_prints_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COOKBOOK_CACHE", "/proc/x")
    row = [{"role": "user", "content": "{}?"}, {"role": "assistant", "content": "{}."}]
    rows = [json.dumps({"messages": row}).replace("{}", str(number)) for number in range(160)]
    Path("chats.jsonl").write_text("\n".join(rows), encoding="utf-8")
    told = tmp_path / "told"
    argv = ["dataset=chats.jsonl", "test_size=8", "max_steps=1", "log_path=runs/mine"]
    sft.main([*argv, "prompts=Hello, world", f"notify=sh -c 'echo \"$1\" > {told}' told"])
    log = Path("runs/mine/train.log").read_text(encoding="utf-8")
    for shown in (
        "chats.jsonl: 160 rows read, 160 examples rendered.",
        "Read as: messages (160 rows)",
        "Only 8 rows are held out: which checkpoint is the best by test/nll is mostly noise. Hold out 32 or "
        "more (test_size=), or set best_metric=None.",
        "Rendered data cannot be kept for the next run:",
    ):
        assert shown in PAGE
        assert shown in log
    assert log.count("user: Hello, world\n") == 2, "before the only step and at the end"
    assert told.read_text(encoding="utf-8").startswith("runs/mine finished after 1 step, test/nll ")
    assert "TOLD runs/mine finished after 1 step, test/nll " in PAGE
