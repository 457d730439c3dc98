"""A SamplingClient as a model of the lm-evaluation-harness."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from cookbook.errors import RequestError
from cookbook.types import ModelInput, PromptScores, SampleResponse, SamplingParams
from cookbook.utils.token_ids import known_tokens
from renderers import Message, Renderer

if TYPE_CHECKING:
    from cookbook.clients.futures import APIFuture
    from cookbook.clients.sampling import SamplingClient

T = TypeVar("T")

_SUPPORTED = {"do_sample", "until", "max_gen_toks", "temperature", "top_p", "top_k"}


class SamplingClientLM(TemplateLM):
    """Queues all requests of a kind at once, so that they share batches.

    A token is greedy if its probability is higher than that of every other token; a tie does not count.
    """

    def __init__(
        self,
        sampling_client: SamplingClient,
        renderer: Renderer,
        context_length: int,
        max_gen_toks: int = 256,
        seed: int = 0,
        is_chat: bool = False,
    ) -> None:
        """With `is_chat` the end of a turn ends a generation, and reasoning is removed from it."""
        super().__init__()
        self._client = sampling_client
        self._renderer = renderer
        self.tokenizer = renderer.tokenizer
        self.max_length = context_length - 1  # the last token is only predicted
        self.max_gen_toks = max_gen_toks
        self._seed = seed
        self._is_chat = is_chat
        self._is_cancelled = threading.Event()

    def cancel(self) -> None:
        """Makes the wait for answers raise CancelledError. Thread-safe."""
        self._is_cancelled.set()

    # -- tokens -----------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        end: int | None = self.tokenizer.eos_token_id
        if end is None:
            raise RequestError("This tokenizer has no end-of-text token, which the harness needs.")
        return end

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context: BOS, or EOS if there is none."""
        begin: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        return f"{self.tokenizer.name_or_path}-{self._renderer.name}".replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns token ids as the tokenizer encodes by default, without a second BOS token."""
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token
            add_special_tokens = not (begin and string.startswith(begin))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns the conversation in the renderer's format, with the generation prompt.

        Without `add_generation_prompt` the last message is the start of the reply, which is appended.
        """
        begun = "" if add_generation_prompt else chat_history[-1]["content"]
        messages = chat_history if add_generation_prompt else chat_history[:-1]
        asked: list[Message] = [{"role": m["role"], "content": m["content"]} for m in messages]
        prompt = self._renderer.build_generation_prompt(asked).to_ints()
        decoded = self.tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return f"{decoded}{begun}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._renderer.name if chat_template else None

    # -- likelihood -------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        futures = []
        for _, context, continuation in requests:
            tokens = [*context, *continuation][-(self.max_length + 1) :]
            futures.append(self._client.score(ModelInput.from_ints(tokens)))
        found = []
        for (_, _, continuation), scores in zip(requests, self._answers(futures), strict=True):
            found.append(_of_the_last(scores, len(continuation)))
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        windows = [
            [
                (None, *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        found = iter(self._loglikelihood_tokens([window for of_text in windows for window in of_text]))
        return [sum(next(found)[0] for _ in of_text) for of_text in windows]

    # -- generation -------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        futures, stops = [], []
        for number, request in enumerate(requests):
            context, options = request.args
            prompt, params = self._prompt_and_params(context, options, self._seed + number)
            stops.append([params.stop] if isinstance(params.stop, str) else list(params.stop or ()))
            futures.append(self._client.sample(prompt, 1, params))
        return [
            self._text_of(response, until)
            for response, until in zip(self._answers(futures), stops, strict=True)
        ]

    def _prompt_and_params(
        self, context: str, options: dict[str, Any], seed: int
    ) -> tuple[ModelInput, SamplingParams]:
        asked: dict[str, Any] = normalize_gen_kwargs(options, self.max_gen_toks)
        if unknown := asked.keys() - _SUPPORTED:
            raise RequestError(
                f"The task generates with {', '.join(sorted(unknown))}, which is not supported. "
                f"Supported: {', '.join(sorted(_SUPPORTED))}."
            )
        room = self.max_length - asked["max_gen_toks"]
        if room < 1:
            raise RequestError(
                f"The task generates {asked['max_gen_toks']} tokens, and the context length is "
                f"{self.max_length}. Lower max_gen_toks."
            )
        ends = self._renderer.get_stop_sequences() if self._is_chat else []
        params = SamplingParams(
            max_tokens=asked["max_gen_toks"],
            seed=seed,
            stop=[text for text in (*asked["until"], *ends) if text and isinstance(text, str)] or None,
            stop_token_ids=[self.eot_token_id, *(end for end in ends if isinstance(end, int))],
            temperature=asked.get("temperature", 1.0) if asked["do_sample"] else 0.0,
            top_p=asked.get("top_p", 1.0),
            top_k=asked.get("top_k", -1),
        )
        return ModelInput.from_ints(self.tok_encode(context)[-room:]), params

    def _text_of(self, response: SampleResponse, until: list[Any]) -> str:
        tokens = response.sequences[0].tokens
        if self._is_chat:
            text = str(self._renderer.parse_response(tokens)[0].get("content") or "")
        else:
            known = known_tokens(self.tokenizer, tokens)
            text = str(
                self.tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            )
        return str(postprocess_generated_text(text, until, None))

    def _answers(self, futures: Sequence[APIFuture[T]]) -> list[T]:
        answers = []
        for future in futures:
            if self._is_cancelled.is_set():
                raise CancelledError
            answers.append(future.result())
        return answers


def _of_the_last(scores: PromptScores, number: int) -> tuple[float, bool]:
    """Returns the total log-probability of the last `number` tokens, and whether each of them is greedy."""
    first = len(scores.logprobs) - number
    logprobs = [logprob for logprob in scores.logprobs[max(first, 0) :] if logprob is not None]
    is_argmax = [flag for flag in scores.is_argmax[max(first, 0) :] if flag is not None]
    return sum(logprobs), all(is_argmax)
