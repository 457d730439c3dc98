"""The commands in the README are valid and its programs run."""

from __future__ import annotations

import asyncio
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from cookbook import Datum, ModelInput, ServiceClient
from cookbook.config import cli
from cookbook.eval import evaluators
from cookbook.eval.evaluators import RunContext, evaluate
from cookbook.supervised import train
from recipes import sft

README = Path(evaluators.__file__).with_name("README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


COMMANDS = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_valid(command: str, capsys: pytest.CaptureFixture) -> None:
    _, _, recipe, *argv = shlex.split(command)
    assert recipe == "recipes.sft"
    if argv[-1] == "--help":
        with pytest.raises(SystemExit):
            sft.main(argv)
        printed = capsys.readouterr().out
        assert "evaluator_builders.0.tasks=(required)" in printed
        assert max(map(len, printed.splitlines())) < 80
    else:
        assert len(cli.make_config(train.Config, sft.DEFAULTS, argv).evaluator_builders) == 1


def test_the_grading_function_works() -> None:
    scope: dict[str, Any] = {}
    exec(blocks("python")[0], scope)
    assert scope["is_short"]({"role": "assistant", "content": "short"}, "") is True


@pytest.mark.slow
def test_the_example_evaluators_run(tiny_qwen3: str, tmp_path: Path) -> None:
    scope: dict[str, Any] = {}
    exec(blocks("python")[1], scope)
    service = ServiceClient(device="cpu")
    client = service.create_lora_training_client(tiny_qwen3, rank=2)
    data = [Datum(ModelInput.from_ints([5, 6]), {"target_tokens": [6, 7]})]
    builder = scope["LengthEvaluatorBuilder"](max_tokens=4)
    length = builder.in_run(RunContext(tmp_path, tiny_qwen3, None, None))()
    found = asyncio.run(evaluate(client, [length, scope["ProbeEvaluator"](data)]))
    assert found.metrics.keys() == {"length/tokens", "probe/nll"}
    assert found.tables.keys() == {"length"}
    service.close()
