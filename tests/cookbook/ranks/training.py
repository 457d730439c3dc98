"""Programs for several processes: training steps of every kind, with results as plain arrays."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from cookbook.clients.service import ServiceClient
from cookbook.engine import processes
from cookbook.engine.model import fsdp
from cookbook.engine.training.memory_needs import activation_cost
from cookbook.errors import CheckpointError, TrainingError
from cookbook.types import AdamParams, Datum, ModelInput, SamplingParams

ADAM = AdamParams(learning_rate=1e-2, weight_decay=0.1, grad_clip_norm=0.5, eps=1e-3)
"""The epsilon keeps steps smooth in gradients near zero, of which Adam otherwise takes the sign alone."""


def make_data(lengths: list[int], seed: int = 0, num_shared: int = 0) -> list[Datum]:
    """Sequences of which some tokens are not trained, with all that any loss asks for.

    Longer sequences begin with the same `num_shared` tokens.
    """
    rng = np.random.default_rng(seed)
    data = []
    for length in lengths:
        ids = rng.integers(3, 300, length + 1)
        if length > num_shared:
            ids[:num_shared] = range(3, 3 + num_shared)
        weights = rng.random(length).astype(np.float32) * (rng.random(length) > 0.3)
        data.append(
            Datum(
                ModelInput.from_ints(ids[:-1]),
                {
                    "target_tokens": ids[1:],
                    "weights": weights / length,
                    "logprobs": -rng.random(length).astype(np.float32),
                    "advantages": rng.normal(size=length).astype(np.float32),
                },
            )
        )
    return data


def plain(data: list[Datum]) -> list[Datum]:
    """Without what only some losses take."""
    return [
        Datum(datum.model_input, {name: datum.loss_fn_inputs[name] for name in ("target_tokens", "weights")})
        for datum in data
    ]


def spread(data: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """A loss that couples all sequences."""
    means = torch.stack([logprobs_T.mean() for logprobs_T in logprobs])
    return means.var(), {"mean": float(means.mean())}


def addresses() -> dict[str, Any]:
    """Where this process listens once it has joined the others."""
    world = processes.current()
    world.duplicate().barrier()
    open_sockets = psutil.Process().net_connections("tcp")
    found = [(one.laddr.ip, one.laddr.port) for one in open_sockets if one.status == psutil.CONN_LISTEN]
    world.barrier()
    interfaces = {name: os.environ.get(name) for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    return {"listens": found, "store": int(os.environ["MASTER_PORT"]), **interfaces}


def result_of(output: Any) -> dict[str, Any]:
    return {
        "loss": output.loss,
        "metrics": dict(output.metrics),
        "logprobs": [found["logprobs"].to_numpy() for found in output.loss_fn_outputs],
        "is_argmax": [
            found["is_argmax"].to_numpy() for found in output.loss_fn_outputs if "is_argmax" in found
        ],
    }


def numpy_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {
        name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor)
        .detach()
        .cpu()
        .numpy()
        .copy()
        for name, tensor in tensors.items()
    }


def steps(
    model: str,
    folder: str,
    rank: int,
    shard: str = "none",
    max_tokens: int | None = 64,
    device: str = "cpu",
    **options: Any,
) -> dict[str, Any]:
    """Passes of every kind and five steps: all that came of them, and what was saved."""
    service = ServiceClient(
        device=device,
        dtype="float32",
        checkpoint_dir=folder,
        max_tokens_per_microbatch=max_tokens,
        shard=shard,
        **options,
    )
    client = service.create_lora_training_client(model, rank=rank, seed=0)
    found: dict[str, Any] = {"passes": [], "gradients": [], "norms": []}
    data = make_data([40, 3, 17, 60, 5, 33, 21], num_shared=20)
    found["passes"].append(result_of(client.forward(plain(data), return_argmax=True).result()))
    found["passes"].append(result_of(client.forward(plain(data), return_logprobs="trained").result()))
    requests = [
        (plain(data), "cross_entropy"),
        (data[:3], "importance_sampling"),
        (data[:1], "ppo"),  # fewer sequences than processes
        (plain(data[2:]), spread),
    ]
    for batch, loss in requests:
        if callable(loss):
            queued = client.forward_backward_custom(batch, loss)
        else:
            queued = client.forward_backward(batch, loss)
        found["passes"].append(result_of(queued.result()))
        found["norms"].append(client.optim_step(ADAM).result().metrics["grad_norm"])
    # Gradients of several passes add up.
    queued = client.forward_backward(plain(data[:4]), return_logprobs="none")
    found["passes"].append(result_of(queued.result()))
    client.forward_backward(plain(data[4:]))
    found["norms"].append(client.optim_step(ADAM).result().metrics["grad_norm"])
    found["saved"] = client.save_state("saved").result().path
    found["weights"] = numpy_of(client._trainer.adapter.weights)
    service.close()
    return found


def resumed(path: str, folder: str, shard: str = "none", dtype: str = "float32") -> dict[str, Any]:
    """One step on from a checkpoint: what was loaded, and what came of the step."""
    service = ServiceClient(
        device="cpu", dtype=dtype, checkpoint_dir=folder, max_tokens_per_microbatch=64, shard=shard
    )
    client = service.create_training_client_from_state_with_optimizer(path)
    trainer = client._trainer

    def weights() -> dict[str, np.ndarray]:
        return numpy_of({name: weight.float() for name, weight in trainer.adapter.weights.items()})

    found = {"weights": weights(), "optimizer": numpy_of(trainer._optimizer.tensors())}
    client.forward_backward(plain(make_data([30, 9, 50, 4], seed=1)))
    found["norm"] = client.optim_step(ADAM).result().metrics["grad_norm"]
    found["weights afterwards"] = weights()
    service.close()
    return found


def samples(model: str, folder: str, rank: int, shard: str) -> dict[str, Any]:
    """What is sampled after a step, what is scored, and that a snapshot stays as it is."""
    service = ServiceClient(
        device="cpu", dtype="float32", checkpoint_dir=folder, max_tokens_per_microbatch=64, shard=shard
    )
    client = service.create_lora_training_client(model, rank=rank, seed=0)
    client.forward_backward(plain(make_data([30, 9, 50, 4])))
    client.optim_step(ADAM)
    snapshot = client.save_weights_and_get_sampling_client()
    prompts = [ModelInput.from_ints(list(range(5, 5 + length))) for length in (3, 7, 4)]
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=3)

    def draw() -> list[Any]:
        queued = [snapshot.sample(prompt, 2, params) for prompt in prompts]
        return [sequence for future in queued for sequence in future.result().sequences]

    before, scored = draw(), snapshot.compute_logprobs(prompts[1]).result()
    client.forward_backward(plain(make_data([30, 9, 50, 4])))
    client.optim_step(ADAM).result()
    after = draw()
    trained = client.forward(plain(make_data([20]))).result().loss
    service.close()
    return {
        "tokens": [list(sequence.tokens) for sequence in before],
        "logprobs": [list(sequence.logprobs) for sequence in before],
        "tokens of the snapshot afterwards": [list(sequence.tokens) for sequence in after],
        "scored": scored[1:],
        "trained": trained,
    }


def limits(model: str, folder: str, shard: str) -> dict[str, Any]:
    """What activations are found to cost, and how large micro-batches may be.

    Layers without an adapter keep their weights for the backward pass.
    """
    service = ServiceClient(device="cpu", dtype="float32", checkpoint_dir=folder, shard=shard)
    client = service.create_lora_training_client(model, rank=4, seed=0, train_mlp=False)
    trainer = client._trainer
    cost = client._engine.submit(activation_cost, trainer.base, trainer.adapter).result()
    service.close()
    return {
        "whole": cost.full,
        "checkpointed": cost.checkpointed,
        "limits": trainer.limits.current.max_tokens,
    }


def scarce(
    model: str, folder: str, shard: str, most_tokens: dict[str, int], passes: int = 2
) -> dict[str, Any]:
    """Passes with memory for so many tokens at once, process by process."""
    service = ServiceClient(
        device="cpu", dtype="float32", checkpoint_dir=folder, max_tokens_per_microbatch=64, shard=shard
    )
    client = service.create_lora_training_client(model, rank=4, seed=0)
    trainer = client._trainer
    most = most_tokens.get(os.environ.get("RANK", "0"), 10**6)
    backpropagate = trainer.base.backpropagate

    def with_little_memory(batch: Any, *arguments: Any) -> Any:
        result = backpropagate(batch, *arguments)
        if batch.tokens_1N.numel() > most:
            raise torch.OutOfMemoryError("pretended")
        return result

    trainer.base.backpropagate = with_little_memory  # type: ignore[method-assign]
    losses = []
    for _ in range(passes):
        losses.append(client.forward_backward(plain(make_data([30, 9, 50, 4, 21]))).result().loss)
        client.optim_step(ADAM).result()
    path = client.save_state("saved").result().path
    service.close()
    return {
        "losses": losses,
        "weights": numpy_of(trainer.adapter.weights),
        "limit": trainer.limits.current.max_tokens,
        "saved": json.loads((Path(path) / "state.json").read_text(encoding="utf-8"))["microbatch_limits"],
    }


def decided(model: str, folder: str, memory: dict[str, float], rank: int) -> bool:
    """Whether weights are sharded on devices of so many bytes, which differ."""
    memory_here = memory[os.environ["RANK"]]
    fsdp.usable_memory = lambda device: memory_here  # type: ignore[assignment]
    service = ServiceClient(
        device="cpu", dtype="bfloat16", checkpoint_dir=folder, max_tokens_per_microbatch=64
    )
    client = service.create_lora_training_client(model, rank=rank, seed=0)
    is_sharded = client.samples_together
    client.forward_backward(plain(make_data([30, 9, 50, 4, 21])))
    client.optim_step(ADAM).result()
    service.close()
    return is_sharded


def in_bfloat16(model: str, folder: str, shard: str) -> dict[str, Any]:
    """Losses of a full fine-tune whose weights are rounded and whose masters are not."""
    service = ServiceClient(
        device="cpu", dtype="bfloat16", checkpoint_dir=folder, max_tokens_per_microbatch=64, shard=shard
    )
    client = service.create_lora_training_client(model, rank=0, seed=0)
    losses = []
    for _ in range(4):
        losses.append(client.forward_backward(plain(make_data([30, 9, 50, 4, 21]))).result().loss)
        client.optim_step(ADAM).result()
    path = client.save_state("saved").result().path
    optimizer = numpy_of(client._trainer._optimizer.tensors())
    service.close()
    return {"losses": losses, "optimizer": optimizer, "saved": path}


def exchanged() -> dict[str, Any]:
    """The results of the methods of a world, one after another."""
    world = processes.current()
    rank, found = world.rank, {}
    found["all_gather_object"] = world.all_gather_object(rank * 10)
    found["broadcast"] = world.broadcast(f"from {rank}")
    found["agree_min"], found["agree_max"] = (
        world.all_reduce_min(rank, -rank),
        world.all_reduce_max(rank, -rank),
    )
    found["on_rank0"] = world.on_rank0(lambda: f"done by {rank}")
    tensors = [torch.full((3,), float(rank)), torch.ones(2, 2), torch.ones(1, dtype=torch.float64)]
    world.duplicate().all_reduce_sum(tensors)
    found["sums"] = [tensor.tolist() for tensor in tensors]
    found["failures"] = [fails(world, who) for who in (0, 1)]
    found["main's failure"] = fails_on_rank0(world)
    return found


def fails(world: processes.World, who: int) -> str:
    try:
        with world.failing_together():
            if world.rank == who:
                raise ValueError("no")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def fails_on_rank0(world: processes.World) -> str:
    def fail() -> None:
        raise CheckpointError(f"full disk on {world.rank}")

    try:
        world.on_rank0(fail)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def says_it_after_the_main_process_is_gone() -> bool:
    """Process 1 fails first; process 0, which keeps the words, is gone when 1 is about to print them."""
    error = ValueError("broken")
    world = processes.current()
    if world.rank == 0:
        world.all_gather_object(None)  # the words of 1 are there
        processes.publish_failure(error)
        os._exit(1)
    processes.publish_failure(error)
    processes._lost_contact(2)  # as a failed exchange does; it finds the failure of this process
    world.all_gather_object(None)
    with contextlib.suppress(TrainingError):
        world.all_gather_object(None)
    return processes.should_report(error)
