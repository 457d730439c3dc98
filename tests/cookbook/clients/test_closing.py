"""Tests that closed or garbage-collected clients leave no memory allocated, and refuse later calls."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from slow import slow_after
from torch import Tensor
from waiting import wait_until

from cookbook import SamplingClient, ServiceClient, TrainingClient
from cookbook.clients.futures import ClientFuture
from cookbook.engine.worker import Engine
from cookbook.errors import ClosedError, CookbookError
from cookbook.types import AdamParams, Datum, LoraConfig, ModelInput, SamplingParams

ADAM = AdamParams(learning_rate=1e-3)
DATA = [Datum(ModelInput.from_ints([5, 6, 7]), {"target_tokens": [6, 7, 8]})]
PROMPT = ModelInput.from_ints([5, 6, 7])
GREEDY = SamplingParams(max_tokens=3, temperature=0.0)


@pytest.fixture(scope="module", autouse=True)
def _no_objects_of_other_tests() -> Iterator[None]:
    """Freezes earlier objects, because each of the many collections would take long otherwise."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceClient]:
    service = ServiceClient(checkpoint_dir=tmp_path / "checkpoints")
    yield service
    service.close()


def live_tensors() -> list[Tensor]:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of the inspected attributes are deprecated
        return [found for found in gc.get_objects() if isinstance(found, Tensor)]


class Storages:
    """Weak references to memory, which also track memory that only C++ holds."""

    def __init__(self) -> None:
        self._seen: list[weakref.ref[Any]] = []

    def add(self, tensors: Any) -> None:
        for tensor in tensors:
            self._seen += [weakref.ref(tensor), weakref.ref(tensor.untyped_storage())]

    def add_all_of(self, client: TrainingClient) -> None:
        trainer = client._trainer
        self.add(trainer.adapter.weights.values())
        self.add(trainer._optimizer.masters.values())
        self.add(trainer._optimizer.tensors().values())
        self.add(p.grad for p in trainer._optimizer.masters.values() if p.grad is not None)

    def num_alive(self) -> int:
        gc.collect()
        return sum(reference() is not None for reference in self._seen)


def use(client: TrainingClient, storages: Storages) -> list[Any]:
    """Makes all calls of a client, some failing. Returns the futures and errors, which outlive the client."""

    def fails(data: Any, logprobs: Any) -> Any:
        raise ValueError("a loss that fails")

    futures: list[Any] = [
        client.forward(DATA),
        client.forward_backward(DATA),
        client.optim_step(ADAM),
        client.forward_backward_custom(DATA, fails),
        client.optim_step(ADAM),
        client.forward_backward(DATA),
        client.load_state("/nowhere"),
    ]
    sampler = client.save_weights_and_get_sampling_client()
    futures += [sampler.sample(PROMPT, 2, GREEDY), sampler.compute_logprobs(PROMPT)]
    for future in futures:
        future.exception()
    storages.add_all_of(client)
    adapter, _ = sampler._open_parts()[2].result()
    storages.add(adapter.weights.values())
    return futures


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", [pytest.param("closed and kept", marks=pytest.mark.slow), "closed", "dropped"]
)
@pytest.mark.parametrize("rank", slow_after(1, [4, 0]))
def test_many_clients_leave_no_memory_allocated(
    way: str, rank: int, service: ServiceClient, tiny_qwen3: str
) -> None:
    storages, kept = Storages(), []

    def one(number: int) -> None:
        client = service.create_lora_training_client(tiny_qwen3, rank=rank, seed=number)
        kept.append(use(client, storages))
        if way != "dropped":
            client.close()
        if way == "closed and kept":
            kept.append(client)

    one(0)
    kept.clear()
    _wait_for_clean_ups(service)
    before = len(live_tensors())
    for number in range(1, 50 if way == "closed and kept" else 12):
        one(number)
    _wait_for_clean_ups(service)
    assert storages.num_alive() == 0
    kept.clear()
    _wait_for_clean_ups(service)
    assert len(live_tensors()) == before


def _wait_for_clean_ups(service: ServiceClient) -> None:
    """Waits until two rounds in a row find the same tensors, because freeing one may free the next."""
    found = [-1]

    def is_settled() -> bool:
        gc.collect()
        for engine in service._engines.values():
            engine.wait()
        found.append(len(live_tensors()))
        return found[-1] == found[-2]

    wait_until(is_settled)


@pytest.mark.parametrize("rank", [4, 0])
def test_a_closed_client_is_freed_without_a_garbage_collection(
    rank: int, service: ServiceClient, tiny_qwen3: str
) -> None:
    """Nothing would trigger a collection on a GPU."""
    client = service.create_lora_training_client(tiny_qwen3, rank=rank, seed=0)
    client.forward_backward(DATA)
    client.optim_step(ADAM).result()
    optimizer = [weakref.ref(tensor) for tensor in client._trainer._optimizer.tensors().values()]
    weights = [weakref.ref(weight) for weight in client._trainer.adapter.weights.values()]
    gc.collect()
    gc.disable()
    try:
        client.close()
        assert not [reference for reference in optimizer if reference() is not None]
        if rank:
            assert not [reference for reference in weights if reference() is not None]
    finally:
        gc.enable()


@pytest.mark.parametrize("rank", [4, 0])
def test_a_closed_service_frees_its_models_without_a_garbage_collection(
    rank: int, tiny_qwen3: str, tmp_path: Path
) -> None:
    """Its clients are still open and referenced when the service is closed."""
    service = ServiceClient(checkpoint_dir=tmp_path)
    client = service.create_lora_training_client(tiny_qwen3, rank=rank, seed=0)
    client.forward_backward(DATA)
    client.optim_step(ADAM).result()
    sampler = client.save_weights_and_get_sampling_client()
    sampler.sample(PROMPT, 1, GREEDY).result()
    model = client._engine.base.model
    storages = [weakref.ref(weight.untyped_storage()) for weight in model.parameters()]
    del model
    gc.collect()
    gc.disable()
    try:
        service.close()
        assert not [reference for reference in storages if reference() is not None]
    finally:
        gc.enable()
    for closed in (client, sampler):
        with pytest.raises(ClosedError):
            closed.get_tokenizer()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["service first", "client later", "dropped"])
def test_services_leave_no_memory_in_whatever_order_objects_end(
    way: str, tiny_qwen3: str, tmp_path: Path
) -> None:
    def one() -> None:
        service = ServiceClient(checkpoint_dir=tmp_path)
        client = service.create_lora_training_client(tiny_qwen3, rank=4, seed=0)
        client.forward_backward(DATA)
        sampler = client.save_weights_and_get_sampling_client()
        future = sampler.sample(PROMPT, 1, GREEDY)
        engine = client._engine
        if way != "dropped":
            service.close()
        if way == "client later":
            sampler.close()
            client.close()
        future.result()
        del service, client, sampler, future
        engine.wait()

    one()
    before = len(live_tensors())
    for _ in range(3):
        one()
    assert len(live_tensors()) == before


def test_clean_ups_after_an_engine_has_ended_are_dropped(tiny_qwen3: str) -> None:
    """Work that references the engine would otherwise keep it, and its model, for good."""
    engine = Engine(tiny_qwen3)
    engine.close()
    engine.clean_up_later(functools.partial(print, engine))
    reference = weakref.ref(engine.base.model)
    del engine
    gc.collect()
    assert reference() is None


@pytest.mark.slow
@pytest.mark.parametrize("rank", [4, 0])
def test_the_error_of_a_save_does_not_reference_weights(
    rank: int, service: ServiceClient, tiny_qwen3: str
) -> None:
    storages, errors = Storages(), []
    for name in ("one", "two"):
        client = service.create_lora_training_client(tiny_qwen3, rank=rank, seed=0)
        client.forward_backward(DATA)
        client.optim_step(ADAM)
        client.save_state(name).result()
        errors.append(client.save_state(name).exception())
        errors.append(client.save_weights_for_sampler("taken").exception())
        storages.add_all_of(client)
        client.close()
    assert [error is None for error in errors] == [False, True, False, False]
    del client
    assert storages.num_alive() == 0


@pytest.mark.cases(1)
@pytest.mark.parametrize("way", ["closed", "dropped"])
def test_sampling_clients_leave_no_memory_allocated(
    way: str, service: ServiceClient, tiny_qwen3: str
) -> None:
    client = service.create_lora_training_client(tiny_qwen3, rank=4, seed=0)
    path = client.save_weights_for_sampler("saved").result().path
    storages = Storages()

    def one() -> SamplingClient | None:
        sampler = service.create_sampling_client(path)
        future = sampler.sample(PROMPT, 1, GREEDY)
        adapter, _ = sampler._open_parts()[2].result()
        assert adapter is not None
        storages.add(adapter.weights.values())
        future.result()
        if way == "dropped":
            return None
        sampler.close()
        return sampler

    one()
    _wait_for_clean_ups(service)
    before = len(live_tensors())
    kept = [one() for _ in range(5)]
    _wait_for_clean_ups(service)
    assert storages.num_alive() == 0
    assert len(live_tensors()) == before
    assert len(kept) == 5


def test_a_sampler_that_is_dropped_before_its_snapshot_is_taken_blocks_nothing(
    service: ServiceClient, tiny_qwen3: str
) -> None:
    client = service.create_lora_training_client(tiny_qwen3, rank=4, seed=0)
    engine, may_go_on = client._engine, threading.Event()
    engine.submit(may_go_on.wait, 20)
    for _ in range(2):
        client.save_weights_and_get_sampling_client()  # no reference is kept
    gc.collect()
    passed = client.forward_backward(DATA)
    may_go_on.set()
    passed.result(timeout=20)
    engine.wait()
    assert list(engine.base.model.peft_config) == [client._trainer.adapter.name]


@pytest.mark.slow
def test_removing_the_last_adapter_restores_the_model(service: ServiceClient, tiny_qwen3: str) -> None:
    of_base = service.create_sampling_client(base_model=tiny_qwen3)
    model = of_base._engine.base.model
    names = [name for name, _ in model.named_parameters()]
    before = of_base.compute_logprobs(PROMPT).result()

    def losses() -> list[float]:
        client = service.create_lora_training_client(tiny_qwen3, rank=4, seed=1)
        found = []
        for _ in range(2):
            found.append(client.forward_backward(DATA).result().loss)
            client.optim_step(ADAM)
        client.close()
        return found

    first = losses()
    assert [name for name, _ in model.named_parameters()] == names
    assert of_base.compute_logprobs(PROMPT).result() == before
    assert losses() == first


@pytest.mark.slow
def test_a_client_that_could_not_load_leaves_no_memory_allocated(
    service: ServiceClient, tiny_qwen3: str, make_model_folder: Any, tmp_path: Path
) -> None:
    client = service.create_lora_training_client(tiny_qwen3, rank=2, seed=0)
    path = Path(client.save_state("damaged").result().path)
    (path / "optimizer.safetensors").write_bytes(b"broken")
    before, errors = len(live_tensors()), []
    for _ in range(3):
        with pytest.raises(CookbookError, match="damaged") as failure:
            service.create_training_client_from_state_with_optimizer(path)
        errors.append(failure.value)
    _wait_for_clean_ups(service)
    assert len(client._engine.base.adapters._peft.peft_config) == 1
    errors.clear()
    del failure
    assert len(live_tensors()) == before


# -- calls after close ------------------------------------------------------------------------


def calls_on(client: Any, arguments: dict[str, tuple[Any, ...]]) -> dict[str, Callable[[], Any]]:
    """Returns every public method of a client and its async twin, but not those of the future that it is."""
    names = [
        name
        for name, value in inspect.getmembers(type(client), inspect.isfunction)
        if not name.startswith("_")
    ]
    return {
        name: lambda name=name: getattr(client, name)(*arguments.get(name.removesuffix("_async"), ()))  # type: ignore[misc]
        for name in names
        if name not in ("close", "from_sampler_handle") and name not in dir(ClientFuture)
    }


TRAINING = {
    "forward": (DATA,),
    "forward_backward": (DATA,),
    "forward_backward_custom": (DATA, lambda data, logprobs: (sum(map(torch.sum, logprobs)), {})),
    "optim_step": (ADAM,),
    "save_state": ("a",),
    "save_weights_for_sampler": ("a",),
    "load_state": ("/nowhere",),
    "load_state_with_optimizer": ("/nowhere",),
    "create_sampling_client": ("/nowhere",),
    "save_weights_external": ("a",),
    "note_failed_pass": (ValueError("refused"),),
}
SAMPLING: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("sample", "stream", "compute_logprobs", "score"), (PROMPT,)),
    "sample_with_listener": (PROMPT, 1, None, lambda *token: None),
}


def refused(call: Callable[[], Any]) -> None:
    with pytest.raises(ClosedError):
        _value(call())


def _value(found: Any) -> Any:
    async def wait() -> Any:
        return await found

    return asyncio.run(wait()) if inspect.iscoroutine(found) else found


@pytest.mark.parametrize("rank", [4, 0])
@pytest.mark.parametrize("closed", ["client", "service"])
def test_every_method_of_a_closed_client_is_refused(
    closed: str, rank: int, service: ServiceClient, tiny_qwen3: str
) -> None:
    client = service.create_lora_training_client(tiny_qwen3, rank=rank, seed=0)
    sampler = client.save_weights_and_get_sampling_client()
    before = set(calls_on(client, TRAINING))
    assert {"forward", "get_info_async", "get_tokenizer", "save_state_async"} <= before
    for each in [client, sampler] if closed == "client" else [service]:
        each.close()
        each.close()
    for call in (*calls_on(client, TRAINING).values(), *calls_on(sampler, SAMPLING).values()):
        refused(call)
    with pytest.raises(ClosedError):
        _ = client.samples_together
    client.close()
    sampler.close()


def test_every_method_of_a_closed_service_is_refused(
    service: ServiceClient, tiny_qwen3: str, tmp_path: Path
) -> None:
    path = service.create_lora_training_client(tiny_qwen3, rank=1, seed=0).save_state("a").result().path
    service.close()
    service.close()
    arguments: dict[str, tuple[Any, ...]] = {
        "create_lora_training_client": (tiny_qwen3,),
        "create_training_client": (tiny_qwen3, LoraConfig(rank=1)),
        "create_training_client_from_state": (path,),
        "create_training_client_from_state_with_optimizer": (path,),
        "create_sampling_client": (path,),
        "copy_weights": (path,),
    }
    for call in calls_on(service, arguments).values():
        refused(call)


@pytest.mark.slow
def test_a_sampler_outlives_the_training_client_that_created_it(
    service: ServiceClient, tiny_qwen3: str
) -> None:
    for rank in (4, 0):
        client = service.create_lora_training_client(tiny_qwen3, rank=rank, seed=0)
        sampler = client.save_weights_and_get_sampling_client()
        expected = sampler.compute_logprobs(PROMPT).result()
        client.close()
        assert sampler.compute_logprobs(PROMPT).result() == expected
        sampler.close()


@pytest.mark.cases(2)
@pytest.mark.parametrize("closed", ["client", "service"])
@pytest.mark.parametrize("rank", [4, 0])
def test_pending_futures_complete_at_close(
    closed: str, rank: int, service: ServiceClient, tiny_qwen3: str
) -> None:
    client = service.create_lora_training_client(tiny_qwen3, rank=rank, seed=0)
    sampler = client.save_weights_and_get_sampling_client()
    go = threading.Event()
    client._engine.submit(go.wait, 10)
    pending = [
        client.forward_backward(DATA),
        client.optim_step(ADAM),
        client.save_state("saved"),
        sampler.sample(PROMPT, 1, GREEDY),
        sampler.compute_logprobs(PROMPT),
    ]
    failing, stream = client.load_state("/nowhere"), sampler.stream(PROMPT, GREEDY)
    closing = threading.Thread(
        target=lambda: [each.close() for each in ([client, sampler] if closed == "client" else [service])]
    )
    closing.start()
    go.set()
    closing.join(timeout=60)
    assert not closing.is_alive()
    for future in [*pending, stream]:
        future.result(timeout=0)
    assert len(list(stream)) == 3
    assert isinstance(failing.exception(timeout=0), CookbookError)


def test_a_custom_loss_can_close_its_own_client(service: ServiceClient, tiny_qwen3: str) -> None:
    client = service.create_lora_training_client(tiny_qwen3, rank=4, seed=0)

    def loss(data: Any, logprobs: Any) -> Any:
        client.close()
        return sum(map(torch.sum, logprobs)), {}

    client.forward_backward_custom(DATA, loss).result(timeout=60)
    with pytest.raises(ClosedError):
        client.get_info()


def test_a_stream_in_a_closed_event_loop_does_not_affect_other_readers(
    service: ServiceClient, tiny_qwen3: str
) -> None:
    """The reader is gone. The samples in the same batch, and other readers, continue."""
    sampler = service.create_sampling_client(base_model=tiny_qwen3)
    go = threading.Event()
    sampler._engine.submit(go.wait, 10)
    stream, beside = sampler.stream(PROMPT, GREEDY), sampler.sample(PROMPT, 1, GREEDY)

    async def start_to_read() -> Any:
        reader = stream.__aiter__()
        task = asyncio.ensure_future(reader.__anext__())
        await asyncio.sleep(0)
        return reader, task

    loop = asyncio.new_event_loop()
    reading = loop.run_until_complete(start_to_read())
    loop.close()
    go.set()
    assert beside.result(timeout=60).sequences[0].tokens == stream.result(timeout=60).tokens
    assert list(stream) == stream.result().tokens
    del reading
