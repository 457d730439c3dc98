"""Samples replies to fixed prompts, which show how a model changes."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import chz

from cookbook.data.types import SupervisedDataset
from cookbook.errors import ConfigError
from cookbook.eval.chat import SamplingEvaluatorBuilder, replies_to
from cookbook.eval.evaluators import SamplingClientEvaluator
from cookbook.types import ModelInput, SamplingParams, TensorData
from cookbook.utils.tables import Table

if TYPE_CHECKING:
    from cookbook.clients.sampling import SamplingClient
    from renderers import Renderer

logger = logging.getLogger(__name__)


QUESTIONS = ("What is the capital of Japan?", "How do I make a cup of tea?")
MAX_PROMPT_TOKENS = 2048
"""Longer held-out prompts are passed over: a table cannot show them."""
MAX_REPEATED = 256
"""After so many examples with a prompt that was found before, no other is looked for."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as it is shown, and as the model gets it."""

    text: str
    tokens: ModelInput


class SamplesEvaluator(SamplingClientEvaluator):
    """Samples one reply to each prompt, logs the replies, and returns them as a table."""

    def __init__(
        self,
        renderer: Renderer,
        prompts: Sequence[str] | None,
        params: SamplingParams,
        name: str = "samples",
    ) -> None:
        """Without `prompts` they are those that `use_held_out` sets, or else two questions."""
        self._renderer = renderer
        self.wants_prompts = prompts is None
        self._prompts: list[Prompt] = [self._asked(text) for text in prompts or QUESTIONS]
        self._params = params
        self._name = name

    def use_held_out(self, data: SupervisedDataset) -> None:
        """Prompts with the first held-out conversations, if they have prompts."""
        self._prompts = held_out_prompts(data, self._renderer) or self._prompts

    async def __call__(self, sampling_client: SamplingClient) -> dict[str, Table]:
        inputs = [prompt.tokens for prompt in self._prompts]
        params = [dataclasses.replace(self._params, seed=_seed(self._params, i)) for i in range(len(inputs))]
        replies = await replies_to(sampling_client, self._renderer, inputs, params)
        rows = []
        for prompt, (reply,) in zip(self._prompts, replies, strict=True):
            logger.info("  user: %s\n  assistant: %s", _indented(prompt.text), _indented(reply.text))
            rows.append((prompt.text, reply.text, reply.stop_reason, reply.num_tokens))
        return {self._name: Table(("prompt", "reply", "stop_reason", "tokens"), rows)}

    def _asked(self, text: str) -> Prompt:
        return Prompt(text, self._renderer.build_generation_prompt([{"role": "user", "content": text}]))


def held_out_prompts(
    data: SupervisedDataset, renderer: Renderer, number: int = len(QUESTIONS)
) -> list[Prompt]:
    """Returns what comes before the first trained token of the first examples in which it differs.

    The model was trained to continue such a text, so it is what the model is prompted with.
    """
    found: dict[tuple[int, ...], Prompt] = {}
    num_repeated = 0
    for datum in chain.from_iterable(data.iter_batches()):
        trained_T = TensorData(datum.loss_fn_inputs["weights"]).to_numpy() > 0
        tokens = datum.model_input.to_ints()[: int(trained_T.argmax()) + 1]
        if not trained_T.any() or len(tokens) > MAX_PROMPT_TOKENS:
            continue
        if tuple(tokens) in found:
            num_repeated += 1
        else:
            found[tuple(tokens)] = Prompt(_last_message(tokens, renderer), ModelInput.from_ints(tokens))
        if len(found) == number or num_repeated == MAX_REPEATED:
            break
    return list(found.values())


def _indented(text: str) -> str:
    """Returns the text with all lines but the first indented, so that none looks like another message."""
    return text.replace("\n", "\n    ")


def _last_message(tokens: list[int], renderer: Renderer) -> str:
    """Returns the text of the user's last message in a prompt; all of the prompt's text if it is not found.

    What the chat format prints around a message is found in a prompt of one letter.
    """
    letter = renderer.tokenizer.encode("x", add_special_tokens=False)
    around = renderer.build_generation_prompt([{"role": "user", "content": "x"}]).to_ints()
    places = [i for i in range(len(around)) if around[i : i + len(letter)] == letter]
    special = set(renderer.tokenizer.all_special_ids)
    for place in places:
        before, after = around[:place], around[place + len(letter) :]
        header = before[max((i for i, token in enumerate(before) if token in special), default=0) :]
        if not header or not after or tokens[-len(after) :] != after:
            continue
        message = tokens[: -len(after)]
        starts = [i for i in range(len(message)) if message[i : i + len(header)] == header]
        if starts:
            return str(renderer.tokenizer.decode(message[starts[-1] + len(header) :])).strip()
    return str(renderer.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def _whole_messages(prompts: Sequence[str]) -> list[str]:
    """Returns the messages of a text that was split at every comma.

    A part that begins with a space continues the message before it, and a text in brackets is a JSON list.
    """
    if len(prompts) and prompts[0].lstrip().startswith("[") and prompts[-1].rstrip().endswith("]"):
        try:
            listed = json.loads(",".join(prompts))
        except ValueError:
            listed = None
        if isinstance(listed, list) and all(isinstance(text, str) for text in listed):
            return listed
    whole: list[str] = []
    for part in prompts:
        if whole and part.startswith(" "):
            whole[-1] += f",{part}"
        else:
            whole.append(part)
    return whole


def _seed(params: SamplingParams, index: int) -> int | None:
    return None if params.seed is None else params.seed + index


@chz.chz
class SamplesEvaluatorBuilder(SamplingEvaluatorBuilder):
    """Samples replies to fixed prompts, for a table."""

    name: str = chz.field(default="samples", doc="name of the table")
    prompts: list[str] | None = chz.field(
        default=None,
        doc="messages of the user, one for each reply; a comma with a space behind it is part of a message; "
        "default: the first two held-out conversations, or two questions if none are held out",
        munger=lambda self, prompts: None if prompts is None else _whole_messages(prompts),
    )

    @chz.validate
    def _check_prompts(self) -> None:
        if self.prompts == []:
            raise ConfigError("prompts is empty. Give at least one, or remove the evaluator.")

    def metric_patterns(self) -> list[str]:
        return []  # the evaluator returns only a table

    def __call__(self) -> SamplesEvaluator:
        renderer = self.make_renderer()
        return SamplesEvaluator(renderer, self.prompts, self.sampling_params(renderer), self.name)
