"""Tests of runs with the keys of an adapter: lora_targets, lora_dropout, use_rslora and add_tokens."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from peft_adapters import load_with_peft, make_adapter
from safetensors.torch import load_file
from transformers import AutoTokenizer

from cookbook import ServiceClient, embedded
from cookbook.config import cli
from cookbook.errors import CheckpointError, ConfigError
from cookbook.eval.chat import ChatEvaluatorBuilder
from cookbook.eval.evaluators import RunContext
from cookbook.supervised import train
from recipes import chat, export, sft

MODEL = embedded.MODEL_NAME
TOKEN = "<sku-7>"
KEYS = ("lora_targets=q_proj,mlp.up_proj", "lora_dropout=0.25", "use_rslora=True", f"add_tokens={TOKEN},<b>")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations whose replies hold a token that the tokenizer lacks."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Item {n}?"},
                {"role": "assistant", "content": f"{TOKEN} it is"},
            ]
        }
        for n in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config_of(log_path: Path, data: Path, *more: str) -> train.Config:
    arguments = [
        f"log_path={log_path}", f"dataset={data}", "lora_rank=4", "batch_size=4", "max_steps=4",
        "save_every=2", "eval_every=0", "infrequent_eval_every=0", *more,
    ]  # fmt: skip
    return cli.make_config(train.Config, sft.DEFAULTS, arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> train.RunSummary:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return asyncio.run(train.main(config_of(folder, data, *KEYS)))


@pytest.mark.slow
def test_a_run_with_every_key_of_an_adapter_records_them_all(finished: train.RunSummary) -> None:
    checkpoint = Path(finished.checkpoint_path)
    config = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["use_rslora"], config["lora_dropout"]) == (True, 0.25)
    names = load_file(checkpoint / "adapter_model.safetensors")
    layers = {name.split(".")[-3] for name in names if "lora_A" in name}
    assert layers == {"q_proj", "up_proj"}
    assert [name for name in names if "trainable_tokens_delta" in name]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert len(tokenizer(f"a{TOKEN}b", add_special_tokens=False)["input_ids"]) == 3
    recorded = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["lora"]
    assert recorded["add_tokens"] == [TOKEN, "<b>"]
    assert recorded["targets"] == ["q_proj", "mlp.up_proj"]


def test_the_replies_are_encoded_with_the_added_token(data: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", data, *KEYS)
    train_data, _ = config.data_builder()
    row = train_data.get_batch(0)[0]
    tokenizer = config.data_builder.tokenizer  # type: ignore[attr-defined]
    assert tokenizer.convert_tokens_to_ids(TOKEN) in row.loss_fn_inputs["target_tokens"].tolist()


@pytest.mark.slow
def test_a_stopped_run_with_every_key_ends_as_one_that_was_not(data: Path, tmp_path: Path) -> None:
    asyncio.run(train.main(config_of(tmp_path / "run", data, *KEYS, "max_steps=2", "lr_schedule=constant")))
    more = asyncio.run(train.main(config_of(tmp_path / "run", data, *KEYS, "lr_schedule=constant")))
    whole = asyncio.run(train.main(config_of(tmp_path / "whole", data, *KEYS, "lr_schedule=constant")))
    found, expected = (
        load_file(Path(run.checkpoint_path) / "adapter_model.safetensors") for run in (more, whole)
    )
    assert found.keys() == expected.keys()
    assert all((found[name] == tensor).all() for name, tensor in expected.items())


@pytest.mark.slow
def test_another_value_of_a_key_is_no_resume(finished: train.RunSummary, data: Path) -> None:
    with pytest.raises(ConfigError, match="add_tokens"):
        asyncio.run(train.main(config_of(finished.log_path, data, *KEYS[:3], "add_tokens=<c>")))
    with pytest.raises(ConfigError, match="lora_targets"):
        asyncio.run(train.main(config_of(finished.log_path, data, *KEYS[1:], "lora_targets=k_proj")))


@pytest.mark.slow
def test_the_tuned_model_is_chatted_with_and_exported(finished: train.RunSummary, tmp_path: Path) -> None:
    export.main([f"checkpoint={finished.checkpoint_path}", f"to={tmp_path / 'merged'}", "format=merged"])
    service, replies = ServiceClient(device="cpu"), []
    for source in ({"checkpoint": str(finished.checkpoint_path)}, {"model_name": str(tmp_path / "merged")}):
        config = chat.ChatConfig(**source, renderer_name="chat_template", max_tokens=6, temperature=0.0)
        _, (speaker,), _ = chat._speakers(config, service)
        turn = speaker.session.ask(f"Is it {TOKEN}?")
        list(turn)
        replies.append(turn.conclude().message)
    service.close()
    assert replies[0] == replies[1]


@pytest.mark.slow
def test_a_run_continues_an_adapter_of_peft_with_its_own_layers(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = str(embedded.MODEL_PATH)
    settings = {
        "target_modules": ["q_proj"],
        "rank_pattern": {r"layers\.1\..*q_proj": 2},
        "lora_dropout": 0.1,
    }
    adapter = make_adapter(
        tmp_path / "adapter", base, r=4, lora_alpha=8, modules_to_save=["norm"], **settings
    )
    start = (f"load_checkpoint_path={adapter}", "lora_alpha=8")
    with caplog.at_level(logging.INFO):
        run = asyncio.run(train.main(config_of(tmp_path / "run", data, *start)))
    found = load_file(Path(run.checkpoint_path) / "adapter_model.safetensors")
    before = load_file(adapter / "adapter_model.safetensors")
    assert found.keys() == before.keys()
    assert any((found[name] != tensor).any() for name, tensor in before.items())
    assert (
        json.loads((Path(run.checkpoint_path) / "adapter_config.json").read_text(encoding="utf-8"))[
            "rank_pattern"
        ]
        == settings["rank_pattern"]
    )
    load_with_peft(base, Path(run.checkpoint_path))
    asyncio.run(
        train.main(
            config_of(tmp_path / "next", data, f"load_checkpoint_path={run.checkpoint_path}", start[1])
        )
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("lora_alpha=32", "lora_alpha=8.*Give lora_alpha=8"),
        ("lora_targets=v_proj", r"lora_targets=\[\], and this run has lora_targets=\['v_proj'\]"),
        ("use_rslora=True", "use_rslora=False, and this run has use_rslora=True"),
        ("add_tokens=<a>", r"add_tokens=\[\], and this run has add_tokens=\['<a>'\]"),
    ],
)
def test_keys_that_contradict_the_adapter_are_refused(
    data: Path, tmp_path: Path, argument: str, message: str
) -> None:
    adapter = make_adapter(tmp_path / "adapter", str(embedded.MODEL_PATH), target_modules=["q_proj"])
    start = (f"load_checkpoint_path={adapter}", *(["lora_alpha=8"] if "alpha" not in argument else []))
    with pytest.raises(CheckpointError, match=message):
        asyncio.run(train.main(config_of(tmp_path / "run", data, *start, argument)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lora_rank=0", "lora_targets=q_proj"], "lora_targets is a setting of a LoRA"),
        (["lora_rank=0", "lora_dropout=0.1"], "lora_dropout is a setting of a LoRA"),
        (["lora_dropout=1"], "Invalid lora_dropout=1.0"),
        (["lora_targets=q_proj", "train_mlp=False"], "Remove one or the other"),
        (["add_tokens=<a>,<a>"], "add_tokens names '<a>' twice"),
        (["lora_targets=q_prok"], "names 'q_prok', and no layer of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_keys_are_refused(data: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        asyncio.run(train.main(config_of(tmp_path / "run", data, *arguments)))


def test_the_same_tokens_in_another_order_are_other_tokens(data: Path, tmp_path: Path) -> None:
    of_data = "dataset_builder.common_config.add_tokens=<b>,<a>"
    with pytest.raises(ConfigError, match="Give both the same tokens in the same order"):
        asyncio.run(train.main(config_of(tmp_path / "run", data, "add_tokens=<a>,<b>", of_data)))
    run = RunContext(tmp_path, MODEL, None, None, add_tokens=("<a>", "<b>"))
    with pytest.raises(ConfigError, match="Remove those of the evaluator"):
        ChatEvaluatorBuilder(add_tokens=["<b>", "<a>"]).in_run(run)
    assert ChatEvaluatorBuilder().in_run(run).add_tokens == ["<a>", "<b>"]


def test_lists_are_read_from_a_file(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text('lora_targets: [q_proj, ".*mlp.*"]\nadd_tokens: ["<a>"]\n', encoding="utf-8")
    config: Any = config_of(tmp_path / "run", data, f"config={file}")
    assert (config.lora_targets, config.add_tokens) == (["q_proj", ".*mlp.*"], ["<a>"])
