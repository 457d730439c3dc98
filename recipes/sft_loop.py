"""A complete fine-tune in one flat loop on the client, to read and to copy.

    python -m recipes.sft_loop
    python -m recipes.sft_loop model_name=Qwen/Qwen3-0.6B data_path=chats.jsonl

`recipes.sft` does the same with pipelining, evaluation, checkpoints and resumes.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence

import chz

import cookbook
from cookbook import embedded
from cookbook.config import cli
from cookbook.data import conversation_to_datum
from cookbook.data.formats import conversations_of
from cookbook.data.sources import BadRow, open_source
from cookbook.errors import DataError
from cookbook.models import recommended_renderer
from cookbook.utils.control_characters import visible
from renderers import TrainOnWhat, get_renderer


@chz.chz
class Config:
    model_name: str = embedded.MODEL_NAME
    data_path: str = str(embedded.PIRATE_PATH)
    prompt: str = "What is the capital of Japan?"
    batch_size: int = 8
    max_length: int = 512
    num_steps: int = 190
    learning_rate: float = embedded.LEARNING_RATE
    lora_rank: int = 32
    num_test: int = 64
    seed: int = 0


def main(argv: Sequence[str]) -> None:
    config = cli.make_config(Config, {}, argv, "recipes.sft_loop")
    # model, tokenizer, renderer
    service_client = cookbook.ServiceClient()
    training_client = service_client.create_lora_training_client(
        base_model=config.model_name, rank=config.lora_rank, seed=config.seed
    )
    renderer = get_renderer(recommended_renderer(config.model_name), training_client.get_tokenizer())

    # data: a list of Datum, one per conversation, with weights for assistant tokens only
    conversations = []
    for row in open_source(config.data_path).rows():
        if isinstance(row, BadRow):
            raise DataError(f"{row.place}: {row.reason}")
        conversations += conversations_of(row)
    random.Random(config.seed).shuffle(conversations)
    data = [
        conversation_to_datum(
            chat.messages, renderer, config.max_length, TrainOnWhat.ALL_ASSISTANT_MESSAGES, chat.tools
        )
        for chat in conversations
    ]
    test_data, train_data = data[: config.num_test], data[config.num_test :]
    if not train_data:
        raise DataError(f"num_test={config.num_test} leaves nothing to train on: there are {len(data)} rows.")

    # evaluation before training
    def held_out_nll() -> float:
        return training_client.forward(test_data).result().loss

    def reply() -> str:
        sampling_client = training_client.save_weights_and_get_sampling_client()
        sampled = sampling_client.sample(
            prompt=renderer.build_generation_prompt([{"role": "user", "content": config.prompt}]),
            num_samples=1,
            sampling_params=cookbook.SamplingParams(
                max_tokens=64, temperature=0.0, stop=renderer.get_stop_sequences() or None
            ),
        )
        message, _ = renderer.parse_response(sampled.sequences[0].tokens)
        return str(message["content"])

    print(visible(f"before: held-out NLL {held_out_nll():.4f}\n  {config.prompt}\n  {reply()}"))

    # training: Adam on the summed loss, with linear decay of the learning rate
    for step in range(config.num_steps):
        start = step * config.batch_size % len(train_data)
        batch = train_data[start : start + config.batch_size]
        forward_backward = training_client.forward_backward(batch)
        optim_step = training_client.optim_step(
            cookbook.AdamParams(learning_rate=config.learning_rate * (1 - step / config.num_steps))
        )
        loss = forward_backward.result().loss
        optim_step.result()
        if step % 20 == 0 or step == config.num_steps - 1:
            print(visible(f"step {step}: train NLL {loss:.4f}"))

    # evaluation after training
    print(visible(f"after: held-out NLL {held_out_nll():.4f}\n  {config.prompt}\n  {reply()}"))
    print(visible(f"saved {training_client.save_state('sft-loop').result().path}"))


if __name__ == "__main__":
    with cli.exiting_on_errors():
        main(sys.argv[1:])
