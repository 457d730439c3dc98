"""The completers of tinker-cookbook: completers.py LOG."""

import asyncio

import tinker
from tinker_cookbook import renderers
from tinker_cookbook.completers import TinkerMessageCompleter, TinkerTokenCompleter
from tinker_cookbook.tokenizer_utils import get_tokenizer


async def main() -> None:
    client = await tinker.ServiceClient().create_sampling_client_async(base_model="Qwen/Qwen3-8B")
    renderer = renderers.get_renderer("qwen3", get_tokenizer("Qwen/Qwen3-8B"))
    prompt = renderer.build_generation_prompt([{"role": "user", "content": "Who are you?"}])
    tokens = await TinkerTokenCompleter(client, max_tokens=8)(prompt, renderer.get_stop_sequences())
    assert len(tokens.tokens) == len(tokens.logprobs)
    assert tokens.sequence_id
    completer = TinkerMessageCompleter(client, renderer, max_tokens=8)
    answer = await completer([{"role": "user", "content": "Who are you?"}])
    print(answer)
    assert answer["role"] == "assistant"


asyncio.run(main())
