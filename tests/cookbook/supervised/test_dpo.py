"""DPO against plain transformers and PEFT, against the formula as TRL writes it, and over a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM

from cookbook import embedded, models
from cookbook.config import cli
from cookbook.errors import ConfigError, DataError
from cookbook.supervised.dpo import DpoConfig, PairDatasetBuilder, dpo_loss
from recipes import dpo

FEW = ["batch_size=3", "test_size=2", "lora_rank=4", "infrequent_eval_every=0", "learning_rate=1e-3"]
CONSTANT = ["lr_schedule=constant", "save_every=0"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pirate answers, preferred over plain ones, in each form of a pair."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = embedded.PIRATE_PATH.read_text(encoding="utf-8").splitlines()[:200]
    chats = [json.loads(line)["messages"] for line in lines]
    chats = [chat for chat in chats if [message["role"] for message in chat] == ["user", "assistant"]][:11]
    rows: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(chats):
        plain = {"role": "assistant", "content": "I do not know."}
        if number % 3 == 0:
            rows.append(
                {"prompt": question["content"], "chosen": answer["content"], "rejected": plain["content"]}
            )
        elif number % 3 == 1:
            rows.append({"prompt": [question], "chosen": [answer], "rejected": [plain]})
        else:
            rows.append({"chosen": [question, answer], "rejected": [question, plain]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dpo") / "run"
    dpo.main([f"log_path={folder}", f"dataset={pairs}", *FEW, *CONSTANT, "max_steps=6", "num_epochs=9"])
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_loss_is_that_of_trl() -> None:
    chosen, rejected, ref_chosen, ref_rejected = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    policy_2P = torch.stack([chosen, rejected], 1).flatten()
    reference_2P = torch.stack([ref_chosen, ref_rejected], 1).flatten()
    losses_P, margins_P = dpo_loss(policy_2P, reference_2P, 0.3)
    # DPOTrainer.dpo_loss, loss_type "sigmoid"
    logratios, ref_logratios = chosen - rejected, ref_chosen - ref_rejected
    torch.testing.assert_close(losses_P, -F.logsigmoid(0.3 * (logratios - ref_logratios)))
    rewards = [0.3 * (chosen - ref_chosen), 0.3 * (rejected - ref_rejected)]
    torch.testing.assert_close(margins_P, rewards[0] - rewards[1])


def test_it_starts_at_log_2_and_learns_to_prefer(run: Path) -> None:
    rows = rows_of(run)
    assert rows[0]["train/dpo_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[0]["test/dpo_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[-1]["test/dpo_loss"] < rows[0]["test/dpo_loss"]
    assert rows[5]["train/dpo_accuracy"] == 1.0
    best = [json.loads(line) for line in (run / "checkpoints.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [one["metric"] for one in best if one.get("metric")] == ["test/dpo_loss"]


def test_the_evaluation_equals_plain_transformers_and_peft(run: Path, pairs: Path) -> None:
    config = cli.make_config(DpoConfig, dpo.DEFAULTS, [f"log_path={run}", f"dataset={pairs}", *FEW])
    _, held_out = config.data_builder()
    assert held_out is not None
    (batch,) = held_out.iter_batches()
    base = AutoModelForCausalLM.from_pretrained(embedded.MODEL_PATH, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, str(run / "checkpoints" / "final"))

    def logprob(datum: Any) -> torch.Tensor:
        ids = torch.tensor([datum.model_input.to_ints()])
        logprobs_TV = tuned(input_ids=ids).logits[0].log_softmax(-1)
        targets_T = torch.from_numpy(datum.loss_fn_inputs["target_tokens"].to_numpy())
        mask_T = torch.from_numpy(datum.loss_fn_inputs["weights"].to_numpy() > 0)
        return logprobs_TV.gather(1, targets_T.clamp(min=0)[:, None])[:, 0][mask_T].sum()

    with torch.no_grad():
        policy = [logprob(datum) for datum in batch]
        with tuned.disable_adapter():
            reference = [logprob(datum) for datum in batch]
    losses = []
    for place in range(0, len(batch), 2):
        gains = [policy[place + side] - reference[place + side] for side in (0, 1)]
        losses.append(math.log1p(math.exp(-0.1 * float(gains[0] - gains[1]))))
    assert rows_of(run)[-1]["test/dpo_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_pairs_are_rendered_as_prompt_and_replies(pairs: Path) -> None:
    config = cli.make_config(DpoConfig, dpo.DEFAULTS, [f"dataset={pairs}", "test_size=0", "batch_size=11"])
    data, _ = config.data_builder()
    (batch,) = data.iter_batches()
    assert len(batch) == 22
    tokenizer = models.get_tokenizer(embedded.MODEL_NAME)
    for chosen, rejected in zip(batch[::2], batch[1::2], strict=True):
        texts = [tokenizer.decode(one.model_input.to_ints()) for one in (chosen, rejected)]
        assert "I do not know" in texts[1]
        assert "I do not know" not in texts[0]
        first = [
            int((one.loss_fn_inputs["weights"].to_numpy() > 0).argmax()) + 1 for one in (chosen, rejected)
        ]
        prompts = [one.model_input.to_ints()[:n] for one, n in zip((chosen, rejected), first, strict=True)]
        assert prompts[0] == prompts[1]


@pytest.mark.slow
def test_a_resumed_run_continues_with_the_recorded_reference(run: Path, pairs: Path, tmp_path: Path) -> None:
    keys = [f"log_path={tmp_path}", f"dataset={pairs}", *FEW, *CONSTANT, "num_epochs=9"]
    dpo.main([*keys, "max_steps=3"])
    dpo.main([*keys, "max_steps=6"])
    assert [row["train/dpo_loss"] for row in rows_of(tmp_path)[:6]] == [
        row["train/dpo_loss"] for row in rows_of(run)[:6]
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Hi", "chosen": "Ahoy"}, "no `rejected`"),
        ({"chosen": "Ahoy", "rejected": "Hi"}, "has no prompt"),
        ({"prompt": "Hi", "chosen": ["Ahoy"], "rejected": ["Hi"]}, "`chosen` is a list, not a string"),
        ({"prompt": 1, "chosen": "Ahoy", "rejected": "Hi"}, "`prompt` is a int, not a string"),
    ],
)
def test_an_incomplete_pair_is_named(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    config = cli.make_config(DpoConfig, dpo.DEFAULTS, [f"dataset={path}"])
    with pytest.raises(DataError, match=reason):
        config.data_builder()


def test_pairs_are_not_streamed_and_beta_is_positive(pairs: Path) -> None:
    for key in ("streaming=True", "beta=0"):
        with pytest.raises(ConfigError):
            cli.make_config(DpoConfig, dpo.DEFAULTS, [f"dataset={pairs}", key])
    assert issubclass(dpo.DEFAULTS["dataset_builder"], PairDatasetBuilder)
