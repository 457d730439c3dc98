"""Tasks run by the real lm-evaluation-harness on local data, compared with its own model class."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
from outside_world import hide_tasks_of_lm_eval

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing

from cookbook import ModelInput, SamplingClient, SamplingParams, ServiceClient
from cookbook.errors import ConfigError, RequestError
from cookbook.eval.integrations.lm_eval import HarnessEvaluatorBuilder, _quietly
from cookbook.eval.integrations.lm_eval_model import SamplingClientLM
from renderers import get_renderer

CONTEXT_LENGTH = 256
TEXTS = [
    "one two three four",
    "What is the capital of France?",
    "How many legs has a spider? eight",
    "naïve 東京 " * 70,
]
TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["Paris", "eight legs", "{{text}}"]
doc_to_target: "{{number}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "tiny_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "tiny_generation": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["e"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
filter_list:
  - name: first-word
    filter: [{function: regex, regex_pattern: "(\\\\w+)"}, {function: take_first}]
""",
}


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"text": text, "number": number % 3} for number, text in enumerate(TEXTS)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"data_files": {"test": str(folder / "data.jsonl")}, "cache_dir": str(folder / "cache")}
    for name, body in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ntest_split: test\ndataset_kwargs: {json.dumps(data)}\n"
        (folder / f"{name}.yaml").write_text(head + body, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def client(tiny_qwen3: str) -> Iterator[SamplingClient]:
    service = ServiceClient(device="cpu")
    yield service.create_sampling_client(base_model=tiny_qwen3)
    service.close()


@pytest.fixture(scope="module")
def harness_model(tiny_qwen3: str) -> HFLM:
    return HFLM(tiny_qwen3, device="cpu", dtype="float32", max_length=CONTEXT_LENGTH - 1, batch_size=3)


MakeModel = Callable[..., SamplingClientLM]


@pytest.fixture
def make_model(client: SamplingClient) -> MakeModel:
    def make(renderer_name: str = "chat_template", **options: Any) -> SamplingClientLM:
        renderer = get_renderer(renderer_name, client.get_tokenizer())
        return SamplingClientLM(client, renderer, CONTEXT_LENGTH, **options)

    return make


def instances(kind: Any, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def test_every_metric_equals_that_of_the_harness_on_the_same_weights(
    client: SamplingClient,
    harness_model: HFLM,
    task_folder: Path,
    tiny_qwen3: str,
    capfd: pytest.CaptureFixture,
) -> None:
    builder = HarnessEvaluatorBuilder(
        model_name=tiny_qwen3, tasks=list(TASKS), include_path=str(task_folder), name="harness"
    )
    evaluator = builder()
    capfd.readouterr()
    found = asyncio.run(evaluator(client))
    assert capfd.readouterr() == ("", "")
    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    with _quietly():
        expected = simple_evaluate(
            harness_model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=False
        )["results"]
    assert found == {
        "harness/tiny_choice/acc": expected["tiny_choice"]["acc,none"],
        "harness/tiny_choice/acc_norm": expected["tiny_choice"]["acc_norm,none"],
        "harness/tiny_rolling/word_perplexity": pytest.approx(
            expected["tiny_rolling"]["word_perplexity,none"], rel=1e-3
        ),
        "harness/tiny_rolling/bits_per_byte": pytest.approx(
            expected["tiny_rolling"]["bits_per_byte,none"], rel=1e-5
        ),
        "harness/tiny_generation/exact_match_first-word": expected["tiny_generation"][
            "exact_match,first-word"
        ],
    }


def test_likelihoods_and_greedy_flags_equal_those_of_the_harness(
    make_model: MakeModel, harness_model: HFLM, tiny_tokenizer: Any
) -> None:
    model = make_model()
    pairs = [
        ("one two", " three"), ("one two ", "three"), ("", "four legs"), ("x" * 600, " four"),
        ("spider", " four" * 150),
    ]  # fmt: skip
    requests = instances("loglikelihood", *pairs)
    found, expected = model.loglikelihood(requests), harness_model.loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    for (ours, _), (theirs, _) in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_greedy_generation_is_reported_as_greedy(
    client: SamplingClient, make_model: MakeModel, harness_model: HFLM
) -> None:
    prompt = [5, 17, 31]
    params = SamplingParams(max_tokens=6, temperature=0, stop_token_ids=[0])
    said = client.sample(ModelInput.from_ints(prompt), 1, params).sequences[0].tokens
    requests = [(("", ""), prompt, said), (("", ""), prompt, [*said[:-1], said[-1] + 1])]
    found = make_model()._loglikelihood_tokens(requests)
    assert [greedy for _, greedy in found] == [True, False]
    expected = harness_model._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [greedy for _, greedy in expected] == [True, False]


def test_a_text_longer_than_the_context_is_scored_in_windows(
    make_model: MakeModel, harness_model: HFLM
) -> None:
    requests = instances("loglikelihood_rolling", ("one two three " * 100,), ("four",))
    found = make_model().loglikelihood_rolling(requests)
    assert found == pytest.approx(harness_model.loglikelihood_rolling(requests, disable_tqdm=True), rel=1e-4)


@pytest.mark.slow
def test_generations_equal_those_of_the_harness(make_model: MakeModel, harness_model: HFLM) -> None:
    asked: list[tuple] = [
        (text, {"until": until, "max_gen_toks": 20}) for text in TEXTS for until in ([], ["e", " "], "th")
    ]
    requests = instances("generate_until", *asked)
    expected = harness_model.generate_until(requests, disable_tqdm=True)
    assert make_model().generate_until(requests) == expected
    assert any(expected)


def test_the_same_seed_samples_the_same_replies(make_model: MakeModel) -> None:
    requests = instances(
        "generate_until", *[("one", {"until": [], "temperature": 1.0, "max_gen_toks": 8})] * 3
    )
    first = make_model(seed=5).generate_until(requests)
    assert first == make_model(seed=5).generate_until(requests)
    assert len(set(first)) > 1, "a question that is asked again is answered anew"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "num_beams, which is not supported"),
        ({"max_gen_toks": 300}, "the context length is 255"),
    ],
)
def test_unsupported_settings_are_refused(make_model: MakeModel, options: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make_model().generate_until(instances("generate_until", ("one", options)))


def test_a_text_that_begins_with_bos_does_not_get_a_second_one(
    make_model: MakeModel, tiny_tokenizer: Any
) -> None:
    begin = "<|endoftext|>"
    tiny_tokenizer.bos_token = begin
    tiny_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, 0)]
    )
    model = make_model()
    model.tokenizer = tiny_tokenizer
    assert model.tok_encode("one") == model.tok_encode(f"{begin}one") == [0, *model.tok_encode("one", False)]
    assert model.prefix_token_id == 0


def test_cancelled_requests_are_not_waited_for(make_model: MakeModel) -> None:
    model = make_model()
    model.cancel()
    with pytest.raises(CancelledError):
        model.loglikelihood(instances("loglikelihood", ("one", " two")))


# -- in the chat format -----------------------------------------------------------------------

HISTORY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]


def test_a_conversation_is_rendered_as_the_model_was_trained(
    make_model: MakeModel, harness_model: HFLM
) -> None:
    model = make_model(is_chat=True)
    prompt = model.apply_chat_template(HISTORY)
    assert prompt == harness_model.apply_chat_template(HISTORY)
    assert model.tok_encode(prompt) == model._renderer.build_generation_prompt(HISTORY).to_ints()  # type: ignore[arg-type]
    begun = [*HISTORY, {"role": "assistant", "content": "It is"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False) == f"{prompt}It is"


def test_a_chat_reply_ends_with_its_turn_and_has_no_thinking(scripted: Any, tiny_tokenizer: Any) -> None:
    client = scripted(lambda prompt, sample: "<think>\nhmm, four\n</think>\n\nfour or five")

    class Now:
        def __init__(self, coroutine: Any) -> None:
            self._answer = asyncio.run(coroutine)

        def result(self) -> Any:
            return self._answer

    client.sample = lambda *args: Now(client.sample_async(*args))
    model = SamplingClientLM(client, get_renderer("qwen3", tiny_tokenizer), 4096, is_chat=True)
    requests = instances("generate_until", (model.apply_chat_template(HISTORY), {"until": [" or"]}))
    assert model.generate_until(requests) == ["four"]
    (_, _, params) = client.asked[0]
    assert tiny_tokenizer.convert_tokens_to_ids("<|im_end|>") in params.stop_token_ids


@pytest.mark.slow
def test_few_shot_examples_are_turns_of_the_conversation(
    client: SamplingClient, harness_model: HFLM, task_folder: Path, tiny_qwen3: str
) -> None:
    builder = HarnessEvaluatorBuilder(
        model_name=tiny_qwen3, tasks=["tiny_choice"], include_path=str(task_folder), num_fewshot=1, limit=2,
        apply_chat_template=True, bootstrap_iters=100, seed=7,
    )  # fmt: skip
    found = asyncio.run(builder()(client))
    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    with _quietly():
        expected = simple_evaluate(
            harness_model, tasks=["tiny_choice"], task_manager=manager, num_fewshot=1, limit=2,
            apply_chat_template=True, bootstrap_iters=100, fewshot_random_seed=7,
        )["results"]["tiny_choice"]  # fmt: skip
    assert found["lm_eval/tiny_choice/acc"] == expected["acc,none"]
    assert found["lm_eval/tiny_choice/acc_stderr"] == expected["acc_stderr,none"]


# -- the builder ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, "tasks is empty"),
        ({"tasks": ["a"], "limit": 0}, "Invalid limit=0: must be >= 1"),
        ({"tasks": ["a"], "num_fewshot": -1}, "Invalid num_fewshot=-1: must be >= 0"),
        ({"tasks": ["a"], "include_path": "/no/where"}, "include_path=/no/where is not a folder"),
        ({"tasks": ["a"], "model_name": None}, "has no model_name"),
    ],
)
def test_invalid_settings_are_refused(options: dict, message: str, tiny_qwen3: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HarnessEvaluatorBuilder(**{"model_name": tiny_qwen3, **options})()


def test_the_error_for_an_unknown_task_names_the_nearest(
    task_folder: Path, tiny_qwen3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_tasks_of_lm_eval(monkeypatch)
    with pytest.raises(
        ConfigError, match="'tiny_choise', which the harness does not know. Did you mean `tiny_choice`?"
    ):
        HarnessEvaluatorBuilder(model_name=tiny_qwen3, tasks=["tiny_choise"], include_path=str(task_folder))()


def test_logging_of_the_harness_is_restored() -> None:
    level = logging.getLogger("lm_eval").level
    with pytest.raises(KeyError), _quietly():
        raise KeyError
    assert logging.getLogger("lm_eval").level == level
