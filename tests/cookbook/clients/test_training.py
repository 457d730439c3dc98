"""Tests of TrainingClient: calls return at once and run in order, and a failure leaves the client usable."""

from __future__ import annotations

import asyncio
import gc
import inspect
import math
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import cookbook
from cookbook import AdamParams, Datum, ModelInput, ServiceClient, TensorData, TrainingClient
from cookbook.engine import checkpoint
from cookbook.errors import CheckpointError, ConfigError, RequestError, TrainingError

ADAM = AdamParams(learning_rate=1e-2)

MakeClient = Callable[..., TrainingClient]


@pytest.fixture(scope="module")
def service(tiny_qwen3: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceClient]:
    service = ServiceClient(device="cpu", checkpoint_dir=tmp_path_factory.mktemp("checkpoints"))
    service.create_lora_training_client(tiny_qwen3, rank=1)
    yield service
    service.close()


@pytest.fixture
def make_client(service: ServiceClient, tiny_qwen3: str) -> MakeClient:
    def make(**lora: Any) -> TrainingClient:
        return service.create_lora_training_client(tiny_qwen3, **{"rank": 4, "seed": 0, **lora})

    return make


@pytest.fixture
def client(make_client: MakeClient) -> TrainingClient:
    return make_client()


def batch(seed: int = 0, lengths: tuple[int, ...] = (9, 14, 4)) -> list[Datum]:
    rng = np.random.default_rng(seed)
    rows = [rng.integers(3, 300, length + 1) for length in lengths]
    return [Datum(ModelInput.from_ints(row[:-1]), {"target_tokens": row[1:]}) for row in rows]


def bits(client: TrainingClient, name: str) -> bytes:
    """Returns what a checkpoint saved now would hold."""
    path = client.save_weights_for_sampler(name, overwrite=True).result().path
    weights = load_file(Path(path) / "adapter_model.safetensors")
    return b"".join(weights[key].numpy().tobytes() for key in sorted(weights))


def steps_read_one_by_one(client: TrainingClient, seeds: range) -> list[float]:
    losses = []
    for seed in seeds:
        losses.append(client.forward_backward(batch(seed)).result().loss)
        client.optim_step(ADAM).result()
    return losses


class Gate:
    """A custom loss that blocks the engine until the gate is opened."""

    def __init__(self) -> None:
        self._open = threading.Event()

    def __call__(
        self, data: list[Datum], logprobs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        assert self._open.wait(30)
        return -torch.cat(logprobs).sum(), {}

    def open(self) -> None:
        self._open.set()


def fail(data: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    raise ZeroDivisionError("the reward was divided by nothing")


# -- typical use --------------------------------------------------------------------------------


def test_the_typical_training_loop_works(client: TrainingClient) -> None:
    data = batch()
    out = client.forward_backward(data=data).result(timeout=600.0)
    assert out.loss > 0
    assert [len(row["logprobs"]) for row in out.loss_fn_outputs] == [9, 14, 4]
    logprobs = [row["logprobs"].tolist() for row in out.loss_fn_outputs]
    nll = -sum(sum(row) for row in logprobs)
    assert out.metrics["loss:sum"] == pytest.approx(nll, rel=1e-5)
    assert out.metrics["weights:sum"] == 27
    assert out.loss == pytest.approx(nll / 27, rel=1e-5)
    step = client.optim_step(adam_params=AdamParams(learning_rate=1e-3)).result()
    assert step.metrics["grad_norm"] > 0
    assert client.forward(data).result().loss < out.loss


def test_ignored_targets_contribute_neither_loss_nor_gradient(make_client: MakeClient) -> None:
    """A target of -100 without weights equals a weight of 0."""
    tokens = ModelInput.from_ints([5, 6, 7, 8])
    ignored = Datum(tokens, {"target_tokens": [6, -100, 8, -100]})
    weighted = Datum(tokens, {"target_tokens": [6, 7, 8, 9], "weights": [1.0, 0.0, 1.0, 0.0]})
    found = []
    for name, datum in (("ignored", ignored), ("weighted", weighted)):
        client = make_client()
        out = client.forward_backward([datum]).result()
        client.optim_step(ADAM)
        found.append((out.loss, out.metrics["weights:sum"], load(client, name)))
    assert found[0][:2] == pytest.approx(found[1][:2])
    torch.testing.assert_close(found[0][2], found[1][2])
    row = client.forward([ignored]).result().loss_fn_outputs[0]["logprobs"].tolist()
    assert row[1] == row[3] == 0.0
    assert row[0] < 0
    assert row[2] < 0


def load(client: TrainingClient, name: str) -> torch.Tensor:
    """Returns all trained weights in one vector."""
    path = client.save_weights_for_sampler(name, overwrite=True).result().path
    weights = load_file(Path(path) / "adapter_model.safetensors")
    return torch.cat([weights[key].flatten() for key in sorted(weights) if "lora_B" in key])


def test_a_batch_with_nothing_to_train_has_loss_zero_and_changes_nothing(client: TrainingClient) -> None:
    before = bits(client, "before")
    out = client.forward_backward(
        [Datum(ModelInput.from_ints([5, 6]), {"target_tokens": [-100, -100]})]
    ).result()
    assert (out.loss, out.metrics["weights:sum"]) == (0.0, 0.0)
    assert client.optim_step(ADAM).result().metrics["grad_norm"] == 0.0
    assert bits(client, "after") == before


def test_the_policy_losses_run_on_sampled_sequences(client: TrainingClient) -> None:
    """With the sampler's own log-probabilities the ratio is 1, so the loss is minus the advantages."""
    prompt = [5, 17, 31]
    sampler = client.save_weights_and_get_sampling_client()
    params = cookbook.SamplingParams(max_tokens=6, seed=0, stop_token_ids=[0])
    sequence = sampler.sample(ModelInput.from_ints(prompt), 1, params).sequences[0]
    num_sampled = len(sequence.tokens)
    whole = prompt + sequence.tokens
    assert sequence.logprobs is not None
    datum = Datum(
        ModelInput.from_ints(whole[:-1]),
        {
            "target_tokens": ModelInput.from_ints(whole[1:]),
            "logprobs": TensorData([0.0] * (len(prompt) - 1) + sequence.logprobs),
            "advantages": torch.full((len(whole) - 1,), 0.5),
            "weights": [0.0] * (len(prompt) - 1) + [1.0] * num_sampled,
        },
    )
    for loss_fn in ("importance_sampling", "ppo"):
        out = client.forward_backward([datum], loss_fn=loss_fn).result()
        assert out.metrics["loss:sum"] == pytest.approx(-0.5 * num_sampled, rel=1e-4)
    config = {"clip_low_threshold": 0.0, "clip_high_threshold": 0.5}
    out = client.forward([datum], "ppo", config).result()
    assert out.metrics["loss:sum"] == pytest.approx(-0.25 * num_sampled, rel=1e-4)


def test_a_datum_may_have_clip_thresholds_for_its_tokens_and_another_takes_those_of_the_loss(
    client: TrainingClient,
) -> None:
    """The expected values are a loop over the log-probabilities that the same call returns."""
    tokens, targets, old, advantages = (
        [5, 17, 31, 8],
        [17, 31, 8, 2],
        [-5.0, -4.0, -7.0, -2.0],
        [1.0, -1.0, 2.0, -2.0],
    )
    inputs = {"target_tokens": targets, "logprobs": old, "advantages": advantages}
    lows, highs = [0.5, 0.9, 0.1, 3.0], [0.6, 2.0, 9.0, 4.0]
    data = [
        Datum(ModelInput.from_ints(tokens), inputs),
        Datum(ModelInput.from_ints(tokens), {**inputs, "clip_low_threshold": lows}),
        Datum(
            ModelInput.from_ints(tokens), {**inputs, "clip_high_threshold": highs, "clip_low_threshold": lows}
        ),
    ]
    for loss_fn in ("ppo", "cispo"):
        config = {"clip_low_threshold": 0.7, "clip_high_threshold": 1.1}
        out = client.forward(data, loss_fn, config).result()
        expected = 0.0
        for number, output in enumerate(out.loss_fn_outputs):
            for place, logprob in enumerate(output["logprobs"].to_numpy().tolist()):
                low = lows[place] if number else 0.7
                high = highs[place] if number == 2 else 1.1
                ratio = math.exp(logprob - old[place])
                clipped = min(max(ratio, low), high)  # as torch.clamp, also where low is above high
                surrogate = min(ratio * advantages[place], clipped * advantages[place])
                expected -= clipped * advantages[place] * logprob if loss_fn == "cispo" else surrogate
        assert out.metrics["loss:sum"] == pytest.approx(expected, rel=1e-4)
    bad = Datum(ModelInput.from_ints(tokens), {**inputs, "clip_low_threshold": [0.5]})
    with pytest.raises(RequestError, match="clip_low_threshold has shape"):
        client.forward([bad], "ppo").result()


def test_the_info_of_a_client(service: ServiceClient, tiny_qwen3: str) -> None:
    client = service.create_lora_training_client(tiny_qwen3, rank=3, alpha=6.0, user_metadata={"owner": "me"})
    info = client.get_info()
    assert info.model_data.lora_rank == info.lora_rank == 3
    assert info.model_data.lora_alpha == 6.0
    assert info.model_data.model_name == info.model_name == tiny_qwen3
    plain = AutoModelForCausalLM.from_pretrained(tiny_qwen3)
    linears = [module for module in plain.modules() if isinstance(module, torch.nn.Linear)]
    assert info.model_data.num_trained_parameters == 3 * sum(
        linear.in_features + linear.out_features for linear in linears
    )
    assert (info.model_data.arch, info.model_data.device, info.model_data.dtype) == (
        "qwen3",
        "cpu",
        "float32",
    )
    assert info.user_metadata == {"owner": "me"}
    assert client.get_tokenizer().decode(client.get_tokenizer().encode("Hello there")) == "Hello there"


def public_methods(kind: type) -> dict[str, Any]:
    return {
        name: value.__func__ if isinstance(value, classmethod) else value
        for name, value in vars(kind).items()
        if not name.startswith("_") and inspect.isfunction(value)
    }


@pytest.mark.parametrize("kind", [ServiceClient, TrainingClient, cookbook.SamplingClient])
def test_every_method_has_an_async_twin_of_the_same_signature(kind: type) -> None:
    """Except `stream`, `create_rest_client` and others that do not block, as in the SDK."""
    methods = public_methods(kind)
    plain = {name for name in methods if not name.endswith("_async")} - {
        "close",
        "copy_weights",
        "stream",
        "create_rest_client",
        "get_sampler_handle",
        "get_end_tokens",
        "note_failed_pass",
        "sample_with_listener",
    }
    assert {name for name in methods if name.endswith("_async")} == {f"{name}_async" for name in plain}
    for name in plain:
        twin = methods[f"{name}_async"]
        assert inspect.iscoroutinefunction(twin)
        assert inspect.signature(twin).parameters == inspect.signature(methods[name]).parameters


@pytest.mark.slow
def test_the_async_twins_do_what_the_methods_do(make_client: MakeClient, service: ServiceClient) -> None:
    one, other = make_client(), make_client()
    losses = steps_read_one_by_one(one, range(2))

    async def main() -> list[float]:
        futures = []
        for seed in range(2):
            futures.append(await other.forward_backward_async(batch(seed)))
            await other.optim_step_async(ADAM)
        saved = await (await other.save_state_async("by-async", overwrite=True))
        await (await other.load_state_with_optimizer_async(saved.path))
        assert (await other.get_info_async()).lora_rank == 4
        sampler = await other.save_weights_and_get_sampling_client_async("by-async")
        assert len(await sampler.compute_logprobs_async(ModelInput.from_ints([5, 6]))) == 2
        capabilities = await service.get_server_capabilities_async()
        assert capabilities == service.get_server_capabilities()
        return [(await future).loss for future in futures]

    assert asyncio.run(main()) == losses
    assert bits(one, "one") == bits(other, "other")


# -- order ----------------------------------------------------------------------------------


def test_calls_return_at_once_whatever_the_engine_is_doing(client: TrainingClient) -> None:
    gate = Gate()
    first = client.forward_backward_custom(batch(), gate)
    futures: list[Any] = [first, client.optim_step(ADAM)]
    for seed in range(3):
        futures += [
            client.forward(batch(seed)),
            client.forward_backward(batch(seed)),
            client.optim_step(ADAM),
        ]
        futures.append(client.save_state(f"queued-{seed}", overwrite=True))
        sampler = client.save_weights_and_get_sampling_client()
        params = cookbook.SamplingParams(max_tokens=2)
        futures += [sampler.sample(ModelInput.from_ints([5]), 1, params)]
        futures += [sampler.compute_logprobs(ModelInput.from_ints([5, 6]))]
    assert not any(future.done() for future in futures)
    with pytest.raises(TimeoutError):
        first.result(timeout=0.01)
    gate.open()
    for future in futures:
        future.result(timeout=60)


@pytest.mark.slow
def test_a_queued_save_holds_exactly_the_state_at_its_place_in_the_queue(make_client: MakeClient) -> None:
    """Rule of order: all calls are queued before anything has run."""
    gate, queued = Gate(), make_client()
    blocker = make_client().forward_backward_custom(batch(), gate)
    saves = []
    for seed in range(4):
        queued.forward_backward(batch(seed))
        queued.optim_step(ADAM)
        saves.append(queued.save_state(f"moment-{seed}", overwrite=True))
    assert not blocker.done()
    gate.open()

    stepwise = make_client()
    for seed, save in enumerate(saves):
        steps_read_one_by_one(stepwise, range(seed, seed + 1))
        expected = Path(stepwise.save_state("stepwise", overwrite=True).result().path)
        found = Path(save.result().path)
        for name in ("adapter_model.safetensors", "optimizer.safetensors"):
            assert (found / name).read_bytes() == (expected / name).read_bytes()


def test_the_depth_of_pipelining_changes_nothing(make_client: MakeClient) -> None:
    one_by_one, at_once = make_client(), make_client()
    losses = steps_read_one_by_one(one_by_one, range(5))
    futures = []
    for seed in range(5):
        futures.append(at_once.forward_backward(batch(seed)))
        at_once.optim_step(ADAM)
    assert [future.result().loss for future in futures] == losses
    assert bits(at_once, "at-once") == bits(one_by_one, "one-by-one")


def test_a_caller_may_reuse_its_buffers_and_lists_while_requests_wait(make_client: MakeClient) -> None:
    expected = make_client()
    loss = expected.forward_backward(batch()).result().loss

    gate, client = Gate(), make_client()
    make_client().forward_backward_custom(batch(), gate)
    buffers = [np.array(datum.loss_fn_inputs["target_tokens"].to_numpy()) for datum in batch()]
    data = [
        Datum(datum.model_input, {"target_tokens": buffer})
        for datum, buffer in zip(batch(), buffers, strict=True)
    ]
    future = client.forward_backward(data)
    for buffer in buffers:
        buffer[:] = 3
    data.clear()
    gate.open()
    assert future.result().loss == loss


# -- failures -------------------------------------------------------------------------------


def test_a_step_queued_behind_a_failed_pass_fails_too_and_drops_the_gradients(
    make_client: MakeClient,
) -> None:
    client = make_client()
    steps_read_one_by_one(client, range(1))
    before = bits(client, "before")
    good = client.forward_backward(batch(1))
    bad = client.forward_backward_custom(batch(2), fail)
    also_good = client.forward_backward(batch(3))
    step = client.optim_step(ADAM)
    with pytest.raises(TrainingError, match=r"optim_step was not run.*divided by nothing") as caught:
        step.result()
    assert isinstance(caught.value.__cause__, TrainingError)
    assert good.result().loss > 0
    assert also_good.result().loss > 0
    with pytest.raises(TrainingError, match="The custom loss failed: ZeroDivisionError"):
        bad.result()
    assert bits(client, "after") == before
    with pytest.raises(TrainingError, match="nothing to step on"):
        client.optim_step(ADAM).result()

    steps_read_one_by_one(client, range(1, 3))
    untroubled = make_client()
    steps_read_one_by_one(untroubled, range(3))
    assert bits(client, "client") == bits(untroubled, "untroubled")


def test_after_a_failure_that_was_read_the_step_uses_the_remaining_gradients(make_client: MakeClient) -> None:
    client = make_client()
    client.forward_backward(batch(0))
    with pytest.raises(TrainingError):
        client.forward_backward_custom(batch(1), fail).result()
    client.optim_step(ADAM).result()
    untroubled = make_client()
    steps_read_one_by_one(untroubled, range(1))
    assert bits(client, "client") == bits(untroubled, "untroubled")


def test_a_failure_read_after_the_step_was_queued_still_fails_the_step(client: TrainingClient) -> None:
    gate = Gate()
    client.forward_backward_custom(batch(), gate)
    bad = client.forward_backward_custom(batch(), fail)
    step = client.optim_step(ADAM)
    gate.open()
    with pytest.raises(TrainingError):
        bad.result()
    with pytest.raises(TrainingError, match="optim_step was not run"):
        step.result()


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    "returned",
    [
        lambda loss: (loss, None),
        lambda loss: loss,
        lambda loss: (loss, {}, 3),
        lambda loss: (torch.stack([loss, loss]), {}),
        lambda loss: (loss.item(), {}),
        lambda loss: (loss.detach(), {}),
    ],
    ids=["no-metrics", "loss-alone", "three-values", "two-losses", "a-float", "detached"],
)
def test_a_custom_loss_with_an_invalid_result_adds_no_gradient(
    client: TrainingClient, returned: Callable[[torch.Tensor], Any]
) -> None:
    before = bits(client, "before")
    bad = client.forward_backward_custom(batch(), lambda data, logprobs: returned(-torch.cat(logprobs).sum()))
    with pytest.raises(TrainingError, match="The custom loss failed"):
        bad.result()
    with pytest.raises(TrainingError, match="nothing to step on"):
        client.optim_step(ADAM).result()
    assert bits(client, "after") == before


def test_a_bad_argument_is_raised_by_the_call_itself_and_nothing_is_queued(client: TrainingClient) -> None:
    good, short = batch()[0], Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2]})
    for submit in (client.forward, client.forward_backward):
        with pytest.raises(RequestError, match="the list of Datum is empty"):
            submit([])
        with pytest.raises(RequestError) as caught:
            submit([good, short])
        assert caught.value.__notes__ == ["in datum 1 of 2"]
        with pytest.raises(RequestError, match="Did you mean `cross_entropy`"):
            submit([good], "cross_entrpy")  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="does not take 'beta'"):
            submit([good], "ppo", {"beta": 1.0})
        with pytest.raises(RequestError, match="exceeds the context length of 256"):
            submit(batch(lengths=(257,)))
    with pytest.raises(RequestError, match="the list of Datum is empty"):
        client.forward_backward_custom([], fail)
    client.forward_backward(batch())
    client.optim_step(ADAM).result()


def test_a_step_without_gradients_is_refused(client: TrainingClient) -> None:
    client.forward(batch()).result()
    with pytest.raises(TrainingError, match="no forward_backward since the last one"):
        client.optim_step(ADAM).result()


def test_a_failed_load_or_save_does_not_affect_training(make_client: MakeClient, tmp_path: Path) -> None:
    client, untroubled = make_client(), make_client()
    client.forward_backward(batch(0))
    with pytest.raises(CheckpointError, match="does not exist"):
        client.load_state(tmp_path / "none").result()
    with pytest.raises(CheckpointError, match="Invalid checkpoint name"):
        client.save_state("../up")
    with pytest.raises(CheckpointError, match="Choose another name"):
        client.save_state("sampler_weights")
    client.save_state("taken", overwrite=True).result()
    with pytest.raises(CheckpointError, match="exists already"):
        client.save_state("taken").result()
    client.optim_step(ADAM)
    steps_read_one_by_one(untroubled, range(1))
    assert bits(client, "client") == bits(untroubled, "untroubled")


# -- several clients ----------------------------------------------------------------------------


def test_clients_on_one_base_model_share_its_weights_and_do_not_disturb_each_other(
    make_client: MakeClient, service: ServiceClient, tiny_qwen3: str
) -> None:
    alone = make_client()
    losses = steps_read_one_by_one(alone, range(4))

    client, other = make_client(), make_client(rank=2, seed=5, train_mlp=False, train_unembed=False)
    of_base = service.create_sampling_client(base_model=tiny_qwen3)
    prompt = ModelInput.from_ints([5, 17, 31])
    untouched = of_base.compute_logprobs(prompt).result()
    embeddings = {
        each._engine.base.model.get_input_embeddings().weight.data_ptr() for each in (client, other)
    }
    assert len(embeddings) == 1

    interleaved = []
    for seed in range(4):
        future = client.forward_backward(batch(seed))
        other.forward_backward(batch(seed + 10))
        of_base.sample(prompt, 1, cookbook.SamplingParams(max_tokens=2))
        client.optim_step(ADAM)
        other.optim_step(ADAM)
        other = make_client(rank=2, seed=seed)
        client.save_weights_and_get_sampling_client().compute_logprobs(prompt)
        interleaved.append(future.result().loss)
    assert interleaved == losses
    assert bits(client, "client") == bits(alone, "alone")
    assert of_base.compute_logprobs(prompt).result() == untouched


@pytest.mark.slow
def test_a_new_adapter_does_not_change_the_model_and_depends_on_its_seed(make_client: MakeClient) -> None:
    client = make_client()
    # The engine's thread then waits, and the model can be read from here.
    client.forward(batch()[:1]).result()
    base = client._engine.base
    tokens = batch()[0].model_input.to_ints()
    with torch.no_grad(), base.adapters.using(None):
        logits = base.model(torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)
    targets = batch()[0].loss_fn_inputs["target_tokens"].tolist()
    expected = [row[target].item() for row, target in zip(logits, targets, strict=True)]
    out = make_client(seed=1).forward(batch()[:1]).result()
    assert out.loss_fn_outputs[0]["logprobs"].tolist() == pytest.approx(expected, abs=1e-4)
    assert bits(make_client(seed=1), "one") == bits(make_client(seed=1), "one")
    assert bits(make_client(seed=1), "one") != bits(make_client(seed=2), "two")


@pytest.mark.parametrize(
    ("groups", "trained"),
    [
        ({}, {"attn", "mlp", "head"}),
        ({"train_attn": False}, {"mlp", "head"}),
        ({"train_mlp": False}, {"attn", "head"}),
        ({"train_unembed": False}, {"attn", "mlp"}),
        ({"train_attn": False, "train_mlp": False}, {"head"}),
    ],
)
def test_the_groups_of_layers_that_are_trained(
    make_client: MakeClient, groups: dict[str, bool], trained: set[str]
) -> None:
    path = make_client(**groups).save_weights_for_sampler("groups", overwrite=True).result().path
    names = load_file(Path(path) / "adapter_model.safetensors")
    found = {"attn" if "attn" in name else "mlp" if "mlp" in name else "head" for name in names}
    assert found == trained
    assert len(names) == 2 * (2 * 4 * ("attn" in trained) + 2 * 3 * ("mlp" in trained) + ("head" in trained))


def test_nothing_to_train_is_refused(make_client: MakeClient) -> None:
    with pytest.raises(ConfigError, match="Nothing to train: set train_attn, train_mlp or train_unembed"):
        make_client(train_attn=False, train_mlp=False, train_unembed=False)


def test_a_misspelt_loss_input_is_refused_by_name(tiny_qwen3: str, tmp_path: Path) -> None:
    client = ServiceClient(checkpoint_dir=tmp_path).create_lora_training_client(tiny_qwen3, rank=2, seed=0)
    datum = Datum(ModelInput.from_ints([5, 6]), {"target_tokens": [6, 7], "weight": [0.0, 1.0]})
    with pytest.raises(
        RequestError, match="has 'weight', which no built-in loss reads. Did you mean `weights`"
    ):
        client.forward_backward([datum])
    custom = client.forward_backward_custom([datum], lambda data, logprobs: (logprobs[0].sum(), {}))
    assert custom.result().loss < 0


@pytest.mark.slow
def test_a_garbage_collected_training_client_frees_its_adapter(tiny_qwen3: str, tmp_path: Path) -> None:
    service = ServiceClient(checkpoint_dir=tmp_path)
    kept = service.create_lora_training_client(tiny_qwen3, rank=2, seed=0)
    dropped = service.create_lora_training_client(tiny_qwen3, rank=2, seed=1)
    peft = kept._engine.base.adapters._peft
    assert len(peft.peft_config) == 2
    del dropped
    gc.collect()
    datum = Datum(ModelInput.from_ints([5, 6]), {"target_tokens": [6, 7]})
    kept.forward([datum]).result()
    assert len(peft.peft_config) == 1


@pytest.mark.slow
def test_a_checkpoint_of_another_model_of_the_same_shape_is_loaded_with_a_warning(
    tiny_qwen3: str, make_model_folder: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = ServiceClient(checkpoint_dir=tmp_path / "checkpoints")
    path = service.create_lora_training_client(tiny_qwen3, rank=2, seed=0).save_state("a").result().path
    other = service.create_lora_training_client(str(make_model_folder(tmp_path / "other")), rank=2, seed=0)
    other.load_state(path).result()
    assert f"was trained on {tiny_qwen3} and is loaded onto" in caplog.text


def test_loading_a_state_discards_earlier_passes(tiny_qwen3: str, tmp_path: Path) -> None:
    client = ServiceClient(checkpoint_dir=tmp_path).create_lora_training_client(tiny_qwen3, rank=2, seed=0)
    path = client.save_state("a").result().path
    datum = Datum(ModelInput.from_ints([5, 6]), {"target_tokens": [6, 7]})

    def fail(data: Any, logprobs: Any) -> Any:
        raise ValueError("broken")

    client.forward_backward_custom([datum], fail)
    client.load_state(path)
    client.forward_backward([datum])
    client.optim_step(AdamParams(learning_rate=1e-3)).result()


# -- what a checkpoint may hold, and its time to live ---------------------------------------------


@pytest.mark.cases(3)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rank", [2, 0])
def test_weights_that_are_not_finite_are_not_saved(
    tiny_qwen3: str, tmp_path: Path, rank: int, value: float
) -> None:
    """An existing checkpoint of that name is kept."""
    service = ServiceClient(device="cpu", checkpoint_dir=tmp_path)
    client = service.create_lora_training_client(tiny_qwen3, rank=rank, seed=0)
    sound = Path(client.save_state("sound").result().path)
    before = {file.name: file.read_bytes() for file in sound.iterdir()}
    weight = [*client._trainer.adapter.weights.values()][-1]
    kept = weight.detach().flatten()[-1].clone()
    with torch.no_grad():
        weight.view(-1)[-1] = value
    for save in (
        lambda: client.save_state("sound", overwrite=True),
        lambda: client.save_state("new"),
        lambda: client.save_weights_for_sampler("new"),
    ):
        with pytest.raises(
            TrainingError, match="Training diverged: 1 of the .* nan or infinite .* Nothing was"
        ):
            save().result()
    with pytest.raises(TrainingError, match="Training diverged"):
        client.save_weights_and_get_sampling_client("named")
    assert {file.name: file.read_bytes() for file in sound.iterdir()} == before
    assert [path.name for path in tmp_path.rglob("new*")] == []
    with torch.no_grad():
        weight.view(-1)[-1] = kept
    client.save_state("sound", overwrite=True).result()
    assert (sound / "state.json").read_bytes() == before["state.json"]
    service.close()


def test_an_optimizer_that_is_not_finite_is_not_saved_with_a_state(make_client: Any) -> None:
    client = make_client()
    client.forward_backward(batch()).result()
    client.optim_step(AdamParams(learning_rate=0.0)).result()
    moments = next(iter(client._trainer._optimizer.tensors().items()))
    moments[1].fill_(float("inf"))
    with pytest.raises(TrainingError, match=r"\(optimizer\) is one\)"):
        client.save_state("of-an-overflow").result()
    client.save_weights_for_sampler("of-an-overflow").result()


def test_a_time_to_live_is_recorded_without_overwriting_a_checkpoint(make_client: Any) -> None:
    client = make_client()
    for save in (client.save_state, client.save_weights_for_sampler):
        path = Path(save("short-lived", 3600, overwrite=True).result().path)
        recorded = checkpoint.read_info(path).expires_at
        assert recorded is not None
        left = datetime.fromisoformat(recorded) - datetime.now(UTC)
        assert 3500 < left.total_seconds() <= 3600
        with pytest.raises(CheckpointError, match="exists already"):
            save("short-lived", 3600).result()
        kept = Path(save("kept", overwrite=True).result().path)
        assert "expires_at" not in (kept / "state.json").read_text(encoding="utf-8")
    client.load_state_with_optimizer(Path(path.parents[1]) / "short-lived").result()


@pytest.mark.parametrize("ttl_seconds", [True, False, 0, -1, 2.5, "3600", 10**12])
def test_an_invalid_time_to_live_is_refused(make_client: Any, ttl_seconds: Any) -> None:
    client = make_client()
    for save in (client.save_state, client.save_weights_for_sampler):
        with pytest.raises(RequestError, match=f"Invalid ttl_seconds={ttl_seconds!r}: must be"):
            save("never", ttl_seconds)
