"""Soft targets and further scores, against plain transformers and PEFT, and loops over targets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from cookbook import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient, TensorData, TrainingClient
from cookbook.errors import RequestError
from cookbook.types import IGNORED_TARGET, PromptProvenanceSpan, SampledProvenanceSpan

TOKENS = [5, 17, 31, 8, 44, 90, 12, 7]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceClient]:
    service = ServiceClient(
        device="cpu", checkpoint_dir=tmp_path_factory.mktemp("checkpoints"), max_tokens_per_microbatch=16
    )
    yield service
    service.close()


@pytest.fixture
def client(service: ServiceClient, tiny_qwen3: str) -> TrainingClient:
    client = service.create_lora_training_client(tiny_qwen3, rank=4, seed=0)
    rng = np.random.default_rng(1)
    row = rng.integers(3, 300, 12)
    client.forward_backward([Datum(ModelInput.from_ints(row[:-1]), {"target_tokens": row[1:]})])
    client.optim_step(AdamParams(learning_rate=5e-2)).result()
    return client


class Plain:
    """The same adapter in plain transformers and PEFT."""

    def __init__(self, base: str, client: TrainingClient) -> None:
        folder = client.save_weights_for_sampler("plain", overwrite=True).result().path
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.model = PeftModel.from_pretrained(model, folder, is_trainable=True).eval()

    def logprobs_TV(self, tokens: list[int]) -> Tensor:
        logits_TV: Tensor = self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        return logits_TV.float().log_softmax(-1)

    def sgd_step(self, loss: Tensor, size: float) -> dict[str, np.ndarray]:
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(loss, list(trained.values()))
        return {
            name.replace(".default.", "."): (size * gradient).numpy()
            for name, gradient in zip(trained, gradients, strict=True)
        }


def gradients_of(client: TrainingClient) -> dict[str, np.ndarray]:
    """Returns the accumulated gradients by the names of PEFT, and drops them."""

    def read() -> dict[str, np.ndarray]:
        weights = client._trainer.adapter.weights
        found = {
            name: weight.grad.clone().numpy() for name, weight in weights.items() if weight.grad is not None
        }
        client._trainer.discard_gradients()
        return found

    return client._engine.submit(read).result()


def soft_data() -> list[Datum]:
    """Rows of 3 and of 2 targets and of one, with ignored ones and weights of 0."""
    rng = np.random.default_rng(0)
    data = []
    for length, shape in ((7, (3,)), (5, (2,)), (6, ())):
        targets = rng.integers(3, 300, (length, *shape))
        weights = rng.random((length, *shape)).astype(np.float32)
        weights[1] = 0
        targets[2] = IGNORED_TARGET
        if shape:
            targets[3, 1] = IGNORED_TARGET
        tokens = rng.integers(3, 300, length)
        data.append(Datum(ModelInput.from_ints(tokens), {"target_tokens": targets, "weights": weights}))
    return data


def truth(plain: Plain, datum: Datum) -> tuple[Tensor, np.ndarray]:
    """Returns the loss, and the log-probabilities in the shape of the targets."""
    targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
    weights = datum.loss_fn_inputs["weights"].to_numpy()
    all_TV = plain.logprobs_TV(datum.model_input.to_ints())
    loss, found = torch.zeros(()), np.zeros(targets.shape, np.float32)
    for place in np.ndindex(targets.shape):
        if targets[place] != IGNORED_TARGET:
            logprob = all_TV[place[0], targets[place]]
            loss = loss - float(weights[place]) * logprob
            found[place] = logprob.item()
    return loss, found


@pytest.mark.parametrize("as_sparse", [False, True])
def test_soft_targets_have_the_loss_and_gradients_of_plain_transformers(
    client: TrainingClient, tiny_qwen3: str, as_sparse: bool
) -> None:
    plain, data = Plain(tiny_qwen3, client), soft_data()
    if as_sparse:
        weights = torch.tensor(data[0].loss_fn_inputs["weights"].to_numpy() * [1.0, 0.0, 0.0])
        sparse = TensorData.from_torch_sparse(weights)
        assert sparse.sparse_crow_indices is not None
        inputs = {"target_tokens": data[0].loss_fn_inputs["target_tokens"], "weights": sparse}
        data[0] = Datum(data[0].model_input, inputs)
    pairs = [truth(plain, datum) for datum in data]
    output = client.forward_backward(data).result()
    for (_, expected), found in zip(pairs, output.loss_fn_outputs, strict=True):
        np.testing.assert_allclose(found["logprobs"].to_numpy(), expected, rtol=1e-4, atol=1e-5)
    loss = torch.stack([loss for loss, _ in pairs]).sum()
    assert output.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-5)
    expected_gradients = plain.sgd_step(loss, 1.0)
    found_gradients = gradients_of(client)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, expected in expected_gradients.items():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found_gradients[name], expected, rtol=1e-3, atol=1e-4 * scale + 1e-7)


@pytest.mark.slow
def test_a_custom_loss_gets_log_probabilities_in_the_shape_of_the_targets(
    client: TrainingClient, tiny_qwen3: str
) -> None:
    plain, data = Plain(tiny_qwen3, client), soft_data()

    def squares(data: list[Datum], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        assert [one.shape for one in logprobs] == [(7, 3), (5, 2), (6,)]
        return torch.stack([one.square().sum() for one in logprobs]).sum(), {"custom": 1.0}

    output = client.forward_backward_custom(data, squares).result()
    loss = torch.zeros(())
    for datum in data:
        targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
        all_TV = plain.logprobs_TV(datum.model_input.to_ints())
        for place in np.ndindex(targets.shape):
            if targets[place] != IGNORED_TARGET:
                loss = loss + all_TV[place[0], targets[place]].square()
    assert output.loss == pytest.approx(loss.item(), rel=1e-5)
    expected_gradients, found_gradients = plain.sgd_step(loss, 1.0), gradients_of(client)
    for name, expected in expected_gradients.items():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found_gradients[name], expected, rtol=1e-3, atol=1e-4 * scale + 1e-7)


def test_only_cross_entropy_takes_soft_targets(client: TrainingClient) -> None:
    targets = np.full((4, 2), 5)
    inputs = {"target_tokens": targets, "logprobs": np.zeros(4), "advantages": np.zeros(4)}
    with pytest.raises(RequestError, match=r"target_tokens has shape \[4, 2\]"):
        client.forward_backward([Datum(ModelInput.from_ints([5, 6, 7, 8]), inputs)], "ppo")
    inputs = {"target_tokens": targets, "weights": np.zeros(4)}
    with pytest.raises(RequestError, match=r"weights have shape \[4\], and target_tokens \[4, 2\]"):
        client.forward_backward([Datum(ModelInput.from_ints([5, 6, 7, 8]), inputs)])


def test_scores_of_the_prompt_and_of_samples_are_those_of_plain_transformers(
    client: TrainingClient, tiny_qwen3: str
) -> None:
    plain, sampler = Plain(tiny_qwen3, client), client.save_weights_and_get_sampling_client()
    targets = torch.full((len(TOKENS) - 1, 2), -1)
    targets[2] = torch.tensor([9, 40])
    targets[5, 1] = 13
    response = sampler.sample(
        ModelInput.from_ints(TOKENS),
        num_samples=2,
        sampling_params=SamplingParams(max_tokens=4, seed=3, stop=[]),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=3,
        topk_sample_logprobs=2,
        target_prompt_logprobs=TensorData.from_torch_sparse(targets, pad_value=-1),
    ).result()
    with torch.no_grad():
        all_TV = plain.logprobs_TV(TOKENS)
    assert response.topk_prompt_logprobs is not None
    assert response.topk_prompt_logprobs[0] is None
    for row_V, found in zip(all_TV[:-1], response.topk_prompt_logprobs[1:], strict=True):
        best, tokens = row_V.topk(3)
        assert [token for token, _ in found or []] == tokens.tolist()
        assert [logprob for _, logprob in found or []] == pytest.approx(best.tolist(), abs=1e-4)
    assert response.target_prompt_logprobs is not None
    scores = response.target_prompt_logprobs.to_numpy()
    for place in np.ndindex(tuple(targets.shape)):
        expected = 0.0 if targets[place] < 0 else all_TV[place[0], targets[place]].item()
        assert scores[place] == pytest.approx(expected, abs=1e-4)
    for sequence in response.sequences:
        with torch.no_grad():
            all_TV = plain.logprobs_TV([*TOKENS, *sequence.tokens])[len(TOKENS) - 1 : -1]
        assert sequence.topk_logprobs is not None
        for row_V, found in zip(all_TV, sequence.topk_logprobs, strict=True):
            best, tokens = row_V.topk(2)
            assert [token for token, _ in found or []] == tokens.tolist()
            assert [logprob for _, logprob in found or []] == pytest.approx(best.tolist(), abs=1e-4)
    last = sampler.sample(
        ModelInput.from_ints(TOKENS), 1, SamplingParams(max_tokens=1), True, prompt_logprobs_last_n=2
    ).result()
    assert response.prompt_logprobs is not None
    assert last.prompt_logprobs == [None] * 6 + response.prompt_logprobs[-2:]


def test_gspo_does_not_depend_on_micro_batches(client: TrainingClient, tiny_qwen3: str) -> None:
    """Compares with a loop over sequences, each with the ratio of all of its marked tokens."""
    plain, rng, data = Plain(tiny_qwen3, client), np.random.default_rng(2), []
    loss = torch.zeros(())
    for length in (14, 9, 15, 4):
        tokens, targets = rng.integers(3, 300, (2, length))
        logprobs_T = plain.logprobs_TV(tokens.tolist())[torch.arange(length), torch.tensor(targets)]
        old_T = logprobs_T.detach() + torch.tensor(rng.normal(0, 0.4, length)).float()
        advantages_T = torch.tensor(rng.normal(size=length)).float()
        mask_T = torch.tensor(rng.choice([0.0, 1.0], length)).float()
        mask_T[0] = 1
        ratio = (((logprobs_T.detach() - old_T) * mask_T).sum() / mask_T.sum()).exp()
        ratio_T = ratio * (logprobs_T - logprobs_T.detach()).exp()
        loss = loss - torch.minimum(ratio_T * advantages_T, ratio_T.clamp(0.95, 1.05) * advantages_T).sum()
        inputs = {"target_tokens": targets, "logprobs": old_T, "advantages": advantages_T}
        data.append(Datum(ModelInput.from_ints(tokens), {**inputs, "sequence_ratio_mask": mask_T}))
    config = {"clip_low_threshold": 0.95, "clip_high_threshold": 1.05}
    output = client.forward_backward(data, "gspo", config).result()
    assert output.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-4)
    expected_gradients, found_gradients = plain.sgd_step(loss, 1.0), gradients_of(client)
    for name, expected in expected_gradients.items():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found_gradients[name], expected, rtol=1e-3, atol=1e-3 * scale + 1e-7)


def test_stable_reinforce_takes_what_was_recorded_when_its_tokens_were_sampled(
    client: TrainingClient,
) -> None:
    """The same as dro with the recorded log-probabilities, on the sampled targets alone."""
    sampler = client.save_weights_and_get_sampling_client(record_stability_info=True)
    params = SamplingParams(max_tokens=5, seed=1, stop=[])
    sequence = sampler.sample(ModelInput.from_ints(TOKENS), 1, params).result().sequences[0]
    row = [*TOKENS, *sequence.tokens]
    advantages = [0.7] * (len(row) - 1)
    inputs = {"target_tokens": row[1:], "advantages": advantages, "logprobs": [9.0] * (len(row) - 1)}
    datum = Datum(ModelInput.from_ints(row[:-1]), inputs)
    with pytest.raises(RequestError, match="needs the sampled sequence of every target"):
        client.forward_backward([datum], "stable_reinforce")
    name = sequence.sequence_id
    prompt, sampled = len(TOKENS), len(sequence.tokens)
    named = datum.with_provenance(
        [
            PromptProvenanceSpan(sequence_id=name, length=prompt),
            SampledProvenanceSpan(sequence_id=name, length=sampled - 1),
        ],
        [
            PromptProvenanceSpan(sequence_id=name, offset=1, length=prompt - 1),
            SampledProvenanceSpan(sequence_id=name, length=sampled),
        ],
    )
    client.forward_backward([Datum(ModelInput.from_ints(TOKENS[:-1]), {"target_tokens": TOKENS[1:]})])
    client.optim_step(AdamParams(learning_rate=5e-2))
    found = client.forward_backward([named], "stable_reinforce", {"kl_coeff": 0.3}).result()
    gradients = gradients_of(client)
    logprobs = [0.0] * (prompt - 1) + (sequence.logprobs or [])
    weights = [0.0] * (prompt - 1) + [1.0] * sampled
    same = Datum(datum.model_input, {**inputs, "logprobs": logprobs, "weights": weights})
    expected = client.forward_backward([same], "dro", {"beta": 0.3}).result()
    assert found.metrics["loss:sum"] == expected.metrics["loss:sum"]
    for key, gradient in gradients_of(client).items():
        np.testing.assert_array_equal(gradients[key], gradient)
    other = Datum(datum.model_input, {**inputs, "target_tokens": [5] * (len(row) - 1)})
    wrong = other.with_provenance(named.model_input_spans or [], named.loss_fn_input_spans or [])
    with pytest.raises(RequestError, match="are not the tokens 0 to 4 of the sampled sequence"):
        client.forward_backward([wrong], "stable_reinforce")


def test_a_saved_adapter_is_what_was_trained_on_soft_targets(client: TrainingClient, tmp_path: Path) -> None:
    before = client.save_weights_for_sampler("before", overwrite=True).result().path
    client.forward_backward(soft_data())
    client.optim_step(AdamParams(learning_rate=1e-2)).result()
    after = client.save_weights_for_sampler("after", overwrite=True).result().path
    first, second = (load_file(Path(path) / "adapter_model.safetensors") for path in (before, after))
    assert any(not torch.equal(first[name], second[name]) for name in first)
