"""`template_kwargs` of a run: what they train, and where the trained model is prompted with them again."""

from __future__ import annotations

import asyncio
import html
import json
import logging
import re
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, TypeAlias

import chz
import pytest
from transformers import AutoTokenizer

from cookbook import SamplingClient, ServiceClient, embedded
from cookbook.data import FromConversationFileBuilder
from cookbook.data.types import ChatDatasetBuilderCommonConfig
from cookbook.errors import CheckpointError, ConfigError, RendererError
from cookbook.eval.chat import ChatEvaluatorBuilder
from cookbook.eval.evaluators import Evaluator, RunContext, SamplingClientEvaluator
from cookbook.export.chat_format import chat_format_of, find_chat_format
from cookbook.models import get_tokenizer
from cookbook.runs.find import find_trained_model
from cookbook.supervised import train
from recipes import chat, preview

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ mood | default('calm') if m.role == 'user' }} {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n {% endif %}"
)
"""Prints a variable in front of what users say."""

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think>\n{{ m.reasoning_content | default('') }}</think>\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{{ '<think>\n</think>\n' if enable_thinking is defined and not enable_thinking else '<think>\nSo' }}"
    "{% endif %}"
)
"""Its usual prompt begins a thought with a word, so a reply without thinking needs that of another mode."""

CHAT: list[Any] = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A spoon."}]
WILD = {"mood": "wild"}
MakeConfig: TypeAlias = Callable[..., train.Config]


@pytest.fixture(scope="module")
def moody(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a small model whose template reads `mood`."""
    folder = tmp_path_factory.mktemp("models") / "moody"
    shutil.copytree(embedded.MODEL_PATH, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a small model whose template prompts for thinking, unless `enable_thinking` is false."""
    folder = tmp_path_factory.mktemp("models") / "thinking"
    shutil.copytree(embedded.MODEL_PATH, folder)
    (folder / "chat_template.jinja").write_text(THINKING, encoding="utf-8")
    return str(folder)


@pytest.fixture
def make_config(moody: str, tmp_path: Path) -> MakeConfig:
    data = tmp_path / "chats.jsonl"
    data.write_text(f"{json.dumps({'messages': CHAT})}\n", encoding="utf-8")

    def make(
        kwargs: dict[str, Any] | None, in_data: Any = ..., model: str = moody, **overrides: Any
    ) -> train.Config:
        common = ChatDatasetBuilderCommonConfig(
            model_name_for_tokenizer=model,
            batch_size=1,
            template_kwargs=kwargs if in_data is ... else in_data,
        )
        values: dict[str, Any] = {
            "log_path": str(tmp_path / "run"),
            "model_name": model,
            "dataset_builder": FromConversationFileBuilder(file_path=str(data), common_config=common),
            "lora_rank": 2,
            "template_kwargs": kwargs,
            "eval_every": 0,
        }
        return train.Config(**values | overrides)

    return make


def trained_text(config: train.Config) -> str:
    """Returns the whole text of the first example of a run."""
    train_data, _ = config.dataset_builder()
    datum = next(datum for batch in train_data.iter_batches() for datum in batch)
    return str(get_tokenizer(config.model_name).decode(datum.model_input.to_ints()))


def chats_prompt(argv: dict[str, Any]) -> str:
    """Returns the text of the prompt with which `recipes.chat` asks its model."""
    with closing(ServiceClient(device="cpu")) as service:
        _, (speaker,), _ = chat._speakers(chat.ChatConfig(**argv), service)
    renderer = speaker.session.renderer
    return str(renderer.tokenizer.decode(renderer.build_generation_prompt(CHAT[:1]).to_ints()))


def prompt(tokenizer: Any, **kwargs: Any) -> str:
    return str(tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True, **kwargs))


@pytest.mark.slow
def test_a_model_is_sampled_chatted_with_and_exported_with_the_variables_it_was_trained_with(
    make_config: MakeConfig, moody: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(WILD)
    wild = prompt(get_tokenizer(moody), **WILD)
    assert "wild Who are you?" in wild
    assert trained_text(config).startswith(wild)

    saved = asyncio.run(train.main(config)).checkpoint_path
    source = find_trained_model(str(saved))
    assert source.template_kwargs == WILD
    assert chats_prompt({"checkpoint": str(saved)}) == wild
    assert chats_prompt({"checkpoint": str(saved), "template_kwargs": {}}) == prompt(get_tokenizer(moody))

    exported = find_chat_format(source)
    exported.write_tokenizer(tmp_path / "exported")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert prompt(tokenizer) == wild
    assert prompt(tokenizer, mood="sad") == prompt(get_tokenizer(moody), mood="sad")

    again = {"load_checkpoint_path": str(saved)}
    asyncio.run(train.main(make_config(None, log_path=str(tmp_path / "other"), **again)))
    assert 'was trained with template_kwargs={"mood": "wild"}, this run trains with None' in caplog.text


@pytest.mark.slow
def test_a_run_is_not_continued_with_other_variables(make_config: MakeConfig) -> None:
    asyncio.run(train.main(make_config(WILD)))
    with pytest.raises(ConfigError, match=r"template_kwargs"):
        asyncio.run(train.main(make_config({"mood": "sad"})))


@pytest.mark.slow
def test_data_rendered_with_other_variables_than_are_recorded_are_warned_about(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    asyncio.run(train.main(make_config(WILD, in_data=None)))
    assert "The data are rendered with template_kwargs=None" in caplog.text


def test_a_variable_that_the_template_does_not_read_is_reported(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    train_data, _ = make_config({**WILD, "temper": 1}).dataset_builder()
    lines = [line.strip() for report in train_data.reports() for line in report.lines()]
    assert any(
        "template_kwargs that the chat template does not read: temper (1 conversation)" in line
        for line in lines
    )


def test_a_row_overrides_the_variables_of_the_run(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config({**WILD, "other": 1})
    row = {"messages": CHAT, "chat_template_kwargs": {"mood": "sad"}}
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps(row)}\n", encoding="utf-8")
    assert "sad Who are you?" in trained_text(config)


def test_rendered_data_are_not_reused_for_other_variables(make_config: MakeConfig) -> None:
    texts = [trained_text(make_config(kwargs)) for kwargs in (None, WILD, {"mood": "sad"}, WILD)]
    assert [text.split("\n")[1].split()[0] for text in texts] == ["calm", "wild", "sad", "wild"]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"mood": float("nan")}, ConfigError, "cannot be recorded as JSON"),
        ({"messages": []}, RendererError, "cannot set messages"),
    ],
)
def test_variables_that_cannot_be_used_are_refused(
    make_config: MakeConfig, kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_config(kwargs).dataset_builder()


def test_a_renderer_written_in_code_refuses_variables_before_a_model_is_loaded(
    make_config: MakeConfig,
) -> None:
    config = make_config(WILD)
    common = chz.replace(config.dataset_builder.common_config, renderer_name="role_colon")  # type: ignore[attr-defined]
    with pytest.raises(RendererError, match=r"role_colon.*mood.*renderer_name=chat_template"):
        chz.replace(config.dataset_builder, common_config=common)()


@pytest.mark.slow
def test_a_renderer_that_does_not_print_the_models_format_is_warned_about(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(None)
    common = chz.replace(config.dataset_builder.common_config, renderer_name="role_colon")  # type: ignore[attr-defined]
    builder = chz.replace(config.dataset_builder, common_config=common)
    asyncio.run(train.main(chz.replace(config, renderer_name="role_colon", dataset_builder=builder)))
    assert re.search(r"Renderer `role_colon` does not .* use renderer_name=chat_template", caplog.text)


def test_evaluators_use_the_variables_of_the_run_with_its_chat_format(moody: str, tmp_path: Path) -> None:
    run = RunContext(tmp_path, moody, "chat_template", None, template_kwargs=WILD)

    def kwargs_of(**fields: Any) -> Any:
        return dict(ChatEvaluatorBuilder(**fields).in_run(run).make_renderer().template_kwargs)

    assert kwargs_of() == WILD
    assert kwargs_of(template_kwargs={"mood": "sad"}) == {"mood": "sad"}
    assert kwargs_of(template_kwargs={}) == kwargs_of(renderer_name="role_colon") == {}


def test_the_exported_template_has_values_of_every_json_type_as_defaults(moody: str) -> None:
    values = {"mood": ["a", {"b": None, "c": True}, 1.5, 'quo"te\n{{ x }} %}'], "unread": 1}
    exported = chat_format_of("chat_template", get_tokenizer(moody), template_kwargs=values)
    assert "unread" not in exported.template
    tokenizer = get_tokenizer(moody)
    expected = tokenizer.apply_chat_template(CHAT, tokenize=False, **values)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, chat_template=exported.template) == expected


@pytest.mark.slow
def test_recorded_variables_that_are_damaged_are_refused(make_config: MakeConfig) -> None:
    saved = asyncio.run(train.main(make_config(WILD))).checkpoint_path
    assert saved is not None
    (state,) = [file for file in Path(saved).glob("*.json") if "template_kwargs" in file.read_text("utf-8")]
    found = json.loads(state.read_text(encoding="utf-8"))
    found["user_metadata"]["template_kwargs"] = "[1"
    state.write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(CheckpointError, match="`template_kwargs` in the checkpoint's metadata is damaged"):
        _ = find_trained_model(str(saved)).template_kwargs


# -- variables that the data choose -----------------------------------------------------------

WITHOUT = {"enable_thinking": False}
THOUGHTFUL: list[Any] = [CHAT[0], {**CHAT[1], "reasoning_content": "So: a spoon.\n"}]


@chz.chz
class AskedBuilder(ChatEvaluatorBuilder):
    """Its metric is whether its prompt ends with an empty thought."""

    def __call__(self) -> Evaluator:
        renderer = self.make_renderer()

        class Asked(SamplingClientEvaluator):
            async def __call__(self, sampling_client: SamplingClient) -> dict[str, float]:
                text = renderer.tokenizer.decode(renderer.build_generation_prompt(CHAT[:1]).to_ints())
                return {"test/is_without": text.endswith("<think>\n</think>\n")}

        return Asked()


@pytest.mark.slow
def test_a_model_is_sampled_in_the_mode_of_all_its_replies(
    make_config: MakeConfig, thinking: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    evaluated = {"evaluator_builders": [AskedBuilder()], "eval_every": 1}
    config = make_config(None, model=thinking, **evaluated)
    without = prompt(get_tokenizer(thinking), **WITHOUT)
    assert trained_text(config).startswith(without)

    summary = asyncio.run(train.main(config))
    assert summary.metrics["test/is_without"] == 1
    said = 'Every trained reply follows a prompt with template_kwargs={"enable_thinking": false}.'
    assert caplog.text.count(said) == 1
    source = find_trained_model(str(summary.checkpoint_path))
    assert source.template_kwargs == WITHOUT
    assert chats_prompt({"checkpoint": str(summary.checkpoint_path)}) == without
    find_chat_format(source).write_tokenizer(tmp_path / "exported")
    assert prompt(AutoTokenizer.from_pretrained(tmp_path / "exported")) == without

    caplog.clear()
    again = {"load_checkpoint_path": str(summary.checkpoint_path), "log_path": str(tmp_path / "again")}
    asyncio.run(train.main(make_config(None, model=thinking, **again)))
    assert "was trained with" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kwargs", "chats", "recorded"),
    [
        pytest.param({}, [CHAT], {}, marks=pytest.mark.slow),
        ({"enable_thinking": True}, [THOUGHTFUL], {"enable_thinking": True}),
        pytest.param(None, [THOUGHTFUL], {}, marks=pytest.mark.slow),
        (None, [CHAT, THOUGHTFUL], {}),
    ],
    ids=["usual by the user", "set by the user", "usual", "mixed"],
)
def test_a_model_is_sampled_as_usual_or_as_the_user_says_where_the_data_do_not_choose(
    make_config: MakeConfig,
    thinking: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kwargs: dict[str, Any] | None,
    chats: list[Any],
    recorded: dict[str, Any],
) -> None:
    caplog.set_level(logging.INFO)
    config = make_config(kwargs, in_data=None, model=thinking)
    rows = "".join(f"{json.dumps({'messages': chat})}\n" for chat in chats)
    (tmp_path / "chats.jsonl").write_text(rows, encoding="utf-8")
    saved = asyncio.run(train.main(config)).checkpoint_path
    assert find_trained_model(str(saved)).template_kwargs == recorded
    assert "Every trained reply" not in caplog.text
    is_noted = '{"enable_thinking": false} (1 turn)' in " ".join(caplog.text.split())
    assert is_noted == (CHAT in chats)


@pytest.mark.slow
def test_rows_with_the_same_variables_choose_those_for_sampling(
    make_config: MakeConfig, moody: str, tmp_path: Path
) -> None:
    config = make_config(None)
    row = {"messages": CHAT, "chat_template_kwargs": {"mood": "sad", "unread": 1}}
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps(row)}\n", encoding="utf-8")
    saved = asyncio.run(train.main(config)).checkpoint_path
    assert chats_prompt({"checkpoint": str(saved)}) == prompt(get_tokenizer(moody), mood="sad")
    assert trained_text(config).startswith(chats_prompt({"checkpoint": str(saved)}))


@pytest.mark.slow
def test_a_resumed_run_keeps_the_recorded_mode_whatever_its_data_choose(
    make_config: MakeConfig, thinking: str
) -> None:
    saved = asyncio.run(train.main(make_config(None, model=thinking, max_steps=1))).checkpoint_path
    (state,) = [file for file in saved.glob("*.json") if "enable_thinking" in file.read_text("utf-8")]
    found = json.loads(state.read_text(encoding="utf-8"))
    del found["user_metadata"]["template_kwargs"]  # as a version wrote it that did not choose
    state.write_text(json.dumps(found), encoding="utf-8")
    longer = make_config(None, model=thinking, max_steps=2, num_epochs=2)
    assert find_trained_model(str(asyncio.run(train.main(longer)).checkpoint_path)).template_kwargs == {}


@pytest.mark.slow
def test_a_stream_whose_mode_is_not_known_at_the_start_is_sampled_as_usual_and_noted(
    make_config: MakeConfig, thinking: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = make_config(None, model=thinking, max_steps=1)
    stream = chz.replace(config.dataset_builder, streaming=True, test_size=0)
    saved = asyncio.run(train.main(chz.replace(config, dataset_builder=stream))).checkpoint_path
    assert find_trained_model(str(saved)).template_kwargs == {}
    assert "Every trained reply" not in caplog.text
    assert '{"enable_thinking": false} (1 turn)' in " ".join(caplog.text.split())


def test_a_preview_names_the_mode_of_all_replies(
    make_config: MakeConfig, thinking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(None, model=thinking)
    fields = {name: getattr(config, name) for name in ("log_path", "model_name", "dataset_builder")}
    shown = preview.PreviewConfig(**fields, html=str(tmp_path / "preview.html"))
    asyncio.run(preview.run(shown))
    said = 'Every trained reply follows a prompt with template_kwargs={"enable_thinking": false}.'
    assert said in " ".join(capsys.readouterr().out.split())
    assert said in html.unescape((tmp_path / "preview.html").read_text(encoding="utf-8"))
