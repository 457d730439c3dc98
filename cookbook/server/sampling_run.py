"""The sampling of one request of OpenAI's API, whose tokens may be read while they are sampled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from cookbook.types import ModelInput, SampledSequence, SamplingParams

if TYPE_CHECKING:
    from cookbook.clients.sampling import SampleFuture, SamplingClient

Token = tuple[int, int, float]
"""The number of a choice, a token, and its log-probability."""


class SamplingRun:
    """Samples several continuations of each of some prompts. They are numbered through."""

    def __init__(
        self,
        client: SamplingClient,
        prompts: Sequence[ModelInput],
        num_choices: int,
        params: SamplingParams,
        num_top: int = 0,
    ) -> None:
        self._client = client
        self._prompts = prompts
        self._num_choices = num_choices
        self._params = params
        self._num_top = num_top
        self._futures: list[SampleFuture] = []
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[Token | None] = asyncio.Queue()

    @property
    def num_prompt_tokens(self) -> int:
        return sum(prompt.length for prompt in self._prompts)

    async def start(self, with_tokens: bool) -> None:
        """Queues the prompts. Raises RequestError for one that cannot be sampled, and then samples none."""
        try:
            for number, prompt in enumerate(self._prompts):
                listener = partial(self._put, number * self._num_choices) if with_tokens else None
                future = await asyncio.to_thread(
                    self._client.sample_with_listener,
                    prompt,
                    self._num_choices,
                    self._params,
                    listener,
                    self._num_top,
                )
                self._futures.append(future)
        except BaseException:
            self.close()
            raise

    async def results(self) -> list[SampledSequence]:
        """Returns the continuations, in order."""
        return [sequence for future in self._futures for sequence in (await future).sequences]

    async def tokens(self) -> AsyncIterator[list[Token]]:
        """Yields the tokens that have arrived, until the last. A failure is raised by `results`."""
        ended = asyncio.gather(*(future.result_async() for future in self._futures), return_exceptions=True)
        ended.add_done_callback(lambda _: self._arrived.put_nowait(None))
        is_over = False
        while not is_over:
            batch = [await self._arrived.get()]
            while not self._arrived.empty():
                batch.append(self._arrived.get_nowait())
            is_over = None in batch
            yield [token for token in batch if token is not None]

    def close(self) -> None:
        """Ends what is still sampled."""
        for future in self._futures:
            future.close()

    def _put(self, first: int, index: int, token: int, logprob: float) -> None:
        """Is called on the engine's thread."""
        self._loop.call_soon_threadsafe(self._arrived.put_nowait, (first + index, token, logprob))
