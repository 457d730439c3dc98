"""configs/rollouts_tiny.yaml trains the embedded model to call a tool."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cookbook import ServiceClient, embedded, models, types
from cookbook.data.formats import conversations_of
from recipes import sft
from renderers import get_renderer

REPOSITORY = Path(__file__).parents[2]
ROLLOUTS = REPOSITORY / "configs" / "data" / "rollouts"


def losses_of(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["train/nll"] for row in map(json.loads, lines) if "train/nll" in row]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.slow
def test_the_loss_falls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    sft.main(["config=configs/rollouts_tiny.yaml", f"log_path={tmp_path / 'run'}", "max_steps=15"])
    losses = losses_of(tmp_path / "run")
    assert len(losses) == 15
    assert mean(losses[-3:]) < 0.5 * mean(losses[:3])


@pytest.mark.slow
def test_the_trained_model_calls_the_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    summary = sft.main(["config=configs/rollouts_tiny.yaml", f"log_path={tmp_path / 'run'}"])
    losses = losses_of(tmp_path / "run")
    assert mean(losses[-12:]) < 0.02 * losses[0]
    client = ServiceClient().create_sampling_client(model_path=str(summary.checkpoint_path))
    tokenizer = models.get_tokenizer(embedded.MODEL_NAME)
    renderer = get_renderer("chat_template", tokenizer, None, True)
    params = types.SamplingParams(max_tokens=80, temperature=0.0, stop=renderer.get_stop_sequences())
    for path in sorted(ROLLOUTS.iterdir()):
        (conversation,) = conversations_of(json.loads(path.read_text(encoding="utf-8")), "atif")
        replies = []
        for number in (1, 3):  # the call, and the answer to its result
            prompt = renderer.build_generation_prompt(
                conversation.messages[:number], tools=conversation.tools
            )
            (sequence,) = client.sample(prompt, 1, params).result().sequences
            message, is_well_formed = renderer.parse_response(sequence.tokens)
            assert is_well_formed, tokenizer.decode(sequence.tokens)
            replies.append(str(message["content"]))
        call = re.fullmatch(r"<tool_call>\n(.*)\n</tool_call>", replies[0])
        assert call, replies[0]
        assert json.loads(call[1]) in [{"name": "lamp", "arguments": {"to": to}} for to in ("on", "off")]
        assert replies[1] == conversation.messages[3]["content"]
