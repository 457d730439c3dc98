"""Tests that the way a batch is run does not change its results, against plain transformers and PEFT.

Shape suffixes: T positions of a sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from slow import slow_except
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from cookbook.engine.model import microbatches
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.memory import MicrobatchLimits
from cookbook.engine.model.prefix_tree import MIN_SHARED_TOKENS, families
from cookbook.engine.model.prefix_tree import Family as PrefixFamily
from cookbook.engine.model.unembedding import BlockSizes
from cookbook.engine.options import EngineOptions
from cookbook.engine.training.trainer import Trainer
from cookbook.types import IGNORED_TARGET, Datum, ModelInput

TOLERANCE = 1e-5
NEVER = 2**62


@dataclass(frozen=True)
class Family:
    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.0, 1.5, 2.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 16,
    "factor": 16.0,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_NO_MLP = {"train_mlp": False}
_LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16,
    "layer_types": ["linear_attention", "full_attention"],
}

PACKED = {
    "qwen2": Family("qwen2"),
    "qwen2-window": Family(
        "qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    ),
    "qwen3": Family("qwen3"),
    "qwen3-tied": Family("qwen3", {"tie_word_embeddings": True}),
    "llama": Family("llama", {"rope_parameters": _LLAMA3_ROPE}),
    "mistral": Family("mistral", {"sliding_window": 8}),
    # The caps are small enough to affect the values.
    "gemma2": Family(
        "gemma2",
        {
            "query_pre_attn_scalar": 8,
            "sliding_window": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": Family("gemma3_text", {"query_pre_attn_scalar": 8, "sliding_window": 8}),
    "phi": Family("phi", {"partial_rotary_factor": 0.5, "num_key_value_heads": 4}),
    "phi3": Family("phi3"),
    "gpt_neox": Family("gpt_neox", {"num_key_value_heads": 4}),
    "granite": Family("granite", {"logits_scaling": 3.0, "embedding_multiplier": 2.0}),
    "cohere": Family("cohere", {"logit_scale": 0.25}),
    "opt": Family("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.5}),
}
RECURRENT = {
    "mamba": Family("mamba", {"state_size": 4}, {"train_attn": False, "train_mlp": False}),
    "mamba2": Family(
        "mamba2",
        {"state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 16},
        {"train_attn": False, "train_mlp": False},
    ),
    "qwen3_next": Family("qwen3_next", {**_EXPERTS, **_LINEAR_ATTENTION}),
    "lfm2": Family("lfm2", {"layer_types": ["conv", "full_attention"]}),
}
EXPERTS = {
    "qwen3_moe": Family("qwen3_moe", _EXPERTS),
    "mixtral": Family("mixtral", _LOCAL_EXPERTS),
    "gpt_oss": Family("gpt_oss", {**_LOCAL_EXPERTS, "sliding_window": 8}),
}
LONGROPE = {
    "phi3-longrope": Family("phi3", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 16})
}
PADDED = {
    "stablelm": Family("stablelm"),
    "stablelm-faint": Family("stablelm", {"initializer_range": 0.005}),
    "bloom": Family("bloom", {"n_head": 4}),
    "llama-window": Family("llama", {"sliding_window": 8}),
    "llama4": Family(
        "llama4_text",
        {
            "num_local_experts": 2,
            "attention_chunk_size": 8,
            "intermediate_size_mlp": 64,
            "moe_layers": [1],
        },
        _NO_MLP,
    ),
}
IN_ROWS = PACKED | RECURRENT | EXPERTS | PADDED
FAMILIES = IN_ROWS | LONGROPE
QUICK = (
    *("qwen3", "qwen2-window", "gemma2", "opt", "mamba2", "qwen3_next", "lfm2", "mixtral", "gpt_oss"),
    *("phi3-longrope", "stablelm", "bloom", "llama4"),
)
"""One family of each kind."""


# -- the truth: plain transformers and PEFT ------------------------------------------------------


def loss_terms(
    loss_fn: str, logprobs_T: Tensor, weights_T: Tensor, sampled_T: Tensor, advantages_T: Tensor
) -> Tensor:
    """Returns one term per token for each loss of the training API, at its default settings."""
    ratio_T = torch.exp(logprobs_T - sampled_T)
    clipped_T = torch.minimum(torch.maximum(ratio_T, torch.tensor(0.8)), torch.tensor(1.2))
    return (
        weights_T
        * {
            "cross_entropy": -logprobs_T,
            "importance_sampling": -ratio_T * advantages_T,
            "ppo": -torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T),
            "cispo": -clipped_T.detach() * advantages_T * logprobs_T,
            "dro": -advantages_T * logprobs_T + 0.025 * (logprobs_T - sampled_T) ** 2,
        }[loss_fn]
    )


@dataclass
class Outcome:
    loss: float
    logprobs: list[np.ndarray]
    gradients: dict[str, Tensor]


@dataclass
class Truth(Outcome):
    """Also holds the sizes of the summands, to which rounding errors are relative."""

    data: list[Datum]
    loss_size: float
    gradient_sizes: dict[str, float]


class Plain:
    """Runs transformers and PEFT, one sequence at a time."""

    def __init__(self, base_folder: str, adapter_folder: Path) -> None:
        self.adapter_folder = adapter_folder
        model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
        self.model = PeftModel.from_pretrained(model, adapter_folder, is_trainable=True).eval()
        self.parameters = {
            name.replace(".default.", "."): parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }

    def logprobs(self, tokens: Sequence[int], targets_T: Tensor) -> Tensor:
        logits_TV = self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        known_T1 = targets_T.clamp(min=0)[:, None]
        return logits_TV.float().log_softmax(-1).gather(1, known_T1)[:, 0].where(targets_T >= 0, 0)

    def run(self, sequences: Sequence[Tokens], loss_fn: str) -> Truth:
        """Also creates the data, whose sampling log-probabilities are the current ones with noise."""
        truth = Truth(0.0, [], {}, [], 0.0, dict.fromkeys(self.parameters, 0.0))
        truth.gradients = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        for sequence in sequences:
            targets_T, weights_T = torch.tensor(sequence.targets), torch.tensor(sequence.weights)
            logprobs_T = self.logprobs(sequence.tokens, targets_T)
            rng = np.random.default_rng(sequence.seed)
            sampled_T = logprobs_T.detach() + torch.tensor(rng.normal(0, 0.3, len(targets_T))).float()
            advantages_T = torch.tensor(rng.normal(0, 1, len(targets_T))).float()
            inputs = {"target_tokens": targets_T, "weights": weights_T}
            if loss_fn != "cross_entropy":
                inputs |= {"logprobs": sampled_T, "advantages": advantages_T}
            truth.data.append(Datum(ModelInput.from_ints(sequence.tokens), inputs))
            terms_T = loss_terms(
                loss_fn, logprobs_T, weights_T.where(targets_T >= 0, 0), sampled_T, advantages_T
            )
            gradients = torch.autograd.grad(terms_T.sum(), list(self.parameters.values()), allow_unused=True)
            truth.loss += float(terms_T.detach().double().sum())
            truth.loss_size += float(terms_T.detach().abs().sum())
            truth.logprobs.append(logprobs_T.detach().numpy())
            for name, gradient in zip(self.parameters, gradients, strict=True):
                if gradient is not None:
                    truth.gradients[name] += gradient
                    truth.gradient_sizes[name] += float(gradient.abs().max())
        return truth


# -- the engine ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """One sequence of a batch."""

    tokens: list[int]
    targets: list[int]
    weights: list[float]
    seed: int


@dataclass(frozen=True)
class Way:
    """A way to run a batch."""

    order: Sequence[int]
    max_tokens: int = 1
    max_in_memory: int = NEVER
    """The limit for sequences that share beginnings."""
    min_shared: int | None = None
    checkpoint_beyond: int = NEVER
    blocks: BlockSizes = BlockSizes.on(torch.device("cpu"))  # noqa: RUF009 - it is frozen
    trained_only: bool = False


def run(trainer: Trainer, data: Sequence[Datum], loss_fn: str, way: Way) -> Outcome:
    trainer.limits.current = MicrobatchLimits(
        way.max_tokens, way.checkpoint_beyond, max_in_memory=way.max_in_memory
    )
    trainer.base.block_sizes = way.blocks
    trainer.base.min_shared_tokens = None if trainer.base.is_padded else way.min_shared
    request = trainer.check([data[i] for i in way.order], loss_fn, None, trained_only=way.trained_only)
    result = trainer.forward_backward(request)
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in trainer.adapter.weights.items()
    }
    trainer.discard_gradients()
    logprobs = dict(zip(way.order, result.logprobs(), strict=True))
    loss = result.output().metrics["loss:sum"]
    return Outcome(loss, [logprobs[i] for i in range(len(data))], gradients)


def assert_same(found: Outcome, expected: Outcome, truth: Truth, trained_only: bool = False) -> None:
    # A gradient that is exactly zero in theory, such as that of a query with a single key, is only rounding.
    smallest = 2e-7 * max(truth.gradient_sizes.values())
    for name, gradient in expected.gradients.items():
        error = float((found.gradients[name] - gradient).abs().max())
        assert error <= TOLERANCE * truth.gradient_sizes[name] + smallest, (name, error)
    assert abs(found.loss - expected.loss) <= TOLERANCE * truth.loss_size
    for datum, found_T, expected_T in zip(truth.data, found.logprobs, expected.logprobs, strict=True):
        targets_T = datum.loss_fn_inputs["target_tokens"].to_numpy()
        scored_T = targets_T != IGNORED_TARGET
        if trained_only:
            scored_T = scored_T & (datum.loss_fn_inputs["weights"].to_numpy() != 0)
        np.testing.assert_allclose(found_T[scored_T], expected_T[scored_T], rtol=TOLERANCE, atol=1e-6)
        assert not found_T[~scored_T].any()


# -- families ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainer_of(
    tmp_path_factory: pytest.TempPathFactory,
    make_model_folder: Callable[..., Path],
    make_trainer: Callable[..., Trainer],
) -> Callable[[str], tuple[Trainer, Plain]]:
    """Returns the engine's trainer and its plain twin, with the same adapter."""
    pairs: dict[str, tuple[Trainer, Plain]] = {}

    def get(name: str) -> tuple[Trainer, Plain]:
        if name not in pairs:
            folder = tmp_path_factory.mktemp("family")
            family = FAMILIES[name]
            base = str(make_model_folder(folder / name, family.model_type, **family.config))
            randomize_constant_weights(base)
            trainer = make_trainer(base, **family.lora)
            trainer.save(folder / "adapter", with_optimizer=False)
            pairs[name] = trainer, Plain(base, folder / "adapter")
        return pairs[name]

    return get


def randomize_constant_weights(folder: str) -> None:
    """Draws random biases and norms, because skipping initial zeros and ones would go unnoticed."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)


VOCAB_SIZE = 373
"""The vocabulary size of the tiny tokenizer."""


@st.composite
def sequences(draw: st.DrawFn, max_length: int = 32) -> Tokens:
    """Draws sequences with weights of every kind, ignored targets, and sometimes nothing to train."""
    length = draw(st.integers(1, max_length))
    seed = draw(st.integers(0, 10**6))
    weights = draw(st.sampled_from([[1.0], [0.0], [0.0, 1.0], [0.0, 0.25, 1.0, 3.0], [-1.0, 0.0, 0.5]]))
    ignored = draw(st.sampled_from([0.0, 0.3]))
    rng = np.random.default_rng(seed)
    tokens_T = rng.integers(0, VOCAB_SIZE, length + 1)
    targets_T = np.where(rng.random(length) < ignored, IGNORED_TARGET, tokens_T[1:])
    return Tokens(
        tokens_T[:-1].tolist(), targets_T.tolist(), rng.choice(weights, length).astype(np.float32), seed
    )


@st.composite
def batches(draw: st.DrawFn) -> list[Tokens]:
    """Draws sequences of which some begin with the tokens of earlier ones, or are those alone.

    Their targets and weights may differ where they share tokens.
    """
    batch = draw(st.lists(sequences(), min_size=1, max_size=5))
    for place in range(1, len(batch)):
        if draw(st.booleans()):
            other, own = batch[draw(st.integers(0, place - 1))], batch[place]
            num_shared = draw(st.integers(1, len(other.tokens)))
            num_own = draw(st.integers(0, len(own.tokens)))
            end = slice(len(own.tokens) - num_own, None)
            if draw(st.booleans()):
                other = replace(other, targets=[*range(len(other.tokens))], weights=[0.5] * len(other.tokens))
            batch[place] = replace(
                own,
                tokens=[*other.tokens[:num_shared], *own.tokens[end]],
                targets=[*other.targets[:num_shared], *own.targets[end]],
                weights=np.float32([*other.weights[:num_shared], *own.weights[end]]),
            )
    return batch


@st.composite
def ways(draw: st.DrawFn, num_sequences: int) -> Way:
    blocks = BlockSizes(
        draw(st.integers(1, 60)), draw(st.integers(20, 500)), draw(st.integers(1, 20 * VOCAB_SIZE))
    )
    return Way(
        order=draw(st.permutations(range(num_sequences))),
        max_tokens=draw(st.sampled_from([1, 16, 40, 80, 1000])),
        max_in_memory=draw(st.sampled_from([24, 60, NEVER])),
        min_shared=draw(st.sampled_from([None, 1, 1, 4])),
        checkpoint_beyond=draw(st.sampled_from([0, 24, NEVER])),
        blocks=draw(st.sampled_from([Way.blocks, blocks])),
        trained_only=draw(st.booleans()),
    )


@pytest.mark.cases(5)
@pytest.mark.parametrize("name", slow_except(QUICK, FAMILIES))
@settings(deadline=None, derandomize=True, max_examples=settings().max_examples // 8, phases=[Phase.generate])
@given(
    drawn=st.data(),
    batch=batches(),
    loss_fn=st.sampled_from(["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"]),
)
def test_packing_sharing_and_micro_batching_change_neither_loss_nor_logprobs_nor_gradients(
    name: str, drawn: st.DataObject, batch: list[Tokens], loss_fn: str, trainer_of: Any
) -> None:
    trainer, plain = trainer_of(name)
    truth = plain.run(batch, loss_fn)
    alone = run(trainer, truth.data, loss_fn, Way(range(len(batch))))
    assert_same(alone, truth, truth)
    for way in drawn.draw(st.lists(ways(len(batch)), min_size=2, max_size=2)):
        found = run(trainer, truth.data, loss_fn, way)
        assert_same(found, alone, truth, way.trained_only)
        assert_same(found, truth, truth, way.trained_only)


# -- segments do not see each other -----------------------------------------------------------


def packed_logprobs(
    trainer: Trainer,
    batch: Sequence[Tokens],
    trained_only: bool = False,
    backward: bool = False,
    min_shared: int | None = None,
) -> list[np.ndarray]:
    data = [
        Datum(ModelInput.from_ints(s.tokens), {"target_tokens": s.targets, "weights": s.weights})
        for s in batch
    ]
    trainer.limits.current = MicrobatchLimits(10_000, NEVER)
    trainer.base.min_shared_tokens = min_shared
    request = trainer.check(data, "cross_entropy", None, trained_only=trained_only)
    result = trainer.forward_backward(request) if backward else trainer.forward(request)
    trainer.discard_gradients()
    assert len(result.places) == 1
    return result.logprobs()


def other_tokens(sequence: Tokens, tokens: Sequence[int]) -> Tokens:
    """Replaces every token and target. The same positions are scored and trained."""
    length = len(sequence.tokens)
    drawn = [tokens[t % len(tokens)] for t in range(length + 1)]
    targets = [
        IGNORED_TARGET if target == IGNORED_TARGET else token
        for target, token in zip(sequence.targets, drawn[1:], strict=True)
    ]
    return replace(sequence, tokens=drawn[:-1], targets=targets)


@pytest.mark.cases(3)
@pytest.mark.parametrize("name", slow_except([name for name in QUICK if name not in LONGROPE], IN_ROWS))
@settings(deadline=None, derandomize=True, max_examples=settings().max_examples // 5, phases=[Phase.generate])
@given(
    drawn=st.data(),
    batch=st.lists(sequences(), min_size=2, max_size=5),
    tokens=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=8),
    trained_only=st.booleans(),
    backward=st.booleans(),
)
def test_changing_one_packed_sequence_leaves_the_logprobs_of_the_others_bit_identical(
    name: str,
    drawn: st.DataObject,
    batch: list[Tokens],
    tokens: list[int],
    trained_only: bool,
    backward: bool,
    trainer_of: Any,
) -> None:
    trainer, _ = trainer_of(name)
    index = drawn.draw(st.integers(0, len(batch) - 1))
    changed = [*batch]
    changed[index] = other_tokens(batch[index], tokens)
    before = packed_logprobs(trainer, batch, trained_only, backward)
    after = packed_logprobs(trainer, changed, trained_only, backward)
    assert_others_unchanged(name, index, before, after)


@pytest.mark.cases(3)
@pytest.mark.parametrize("name", PACKED | RECURRENT | EXPERTS)
@pytest.mark.parametrize("backward", [False, True])
def test_changing_one_branch_leaves_the_logprobs_of_the_others_bit_identical(
    name: str, backward: bool, trainer_of: Any
) -> None:
    """The branch keeps its place: it shares as much with the others as before."""
    trainer, _ = trainer_of(name)
    rng = np.random.default_rng(0)
    stem, *ends = (rng.integers(0, VOCAB_SIZE, length).tolist() for length in (20, 9, 14, 1, 6, 5))

    def made(tokens: list[int]) -> Tokens:
        return Tokens(tokens, [*tokens[1:], 7], np.ones(len(tokens), np.float32), 0)

    batch = [
        made(stem + ends[0]),
        made(stem + ends[1]),
        made(stem[:12] + ends[2]),
        made(stem + ends[1][:8] + ends[3]),
        made(stem[:15]),
    ]
    changed = [*batch]
    changed[3] = made([*batch[3].tokens[:29], *((token + 1) % VOCAB_SIZE for token in batch[3].tokens[29:])])
    before, after = (
        packed_logprobs(trainer, each, backward=backward, min_shared=1) for each in (batch, changed)
    )
    assert np.abs(before[3] - after[3]).max() > 1e-3
    assert_others_unchanged(name, 3, before, after)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "mixtral"])
def test_a_batch_with_nothing_to_share_has_the_same_bits_with_and_without_sharing(
    name: str, trainer_of: Any
) -> None:
    trainer, _ = trainer_of(name)
    rng = np.random.default_rng(0)
    data = []
    for length in (40, 25, 31):  # they share a header that is too short to matter
        tokens = [*range(MIN_SHARED_TOKENS - 1), *rng.integers(0, VOCAB_SIZE, length).tolist()]
        data.append(Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]}))
    way = Way(range(3), max_tokens=1000)
    alone, shared = (
        run(trainer, data, "cross_entropy", replace(way, min_shared=min_shared))
        for min_shared in (None, MIN_SHARED_TOKENS)
    )
    assert alone.loss == shared.loss
    for one, other in zip(alone.logprobs, shared.logprobs, strict=True):
        assert one.tobytes() == other.tobytes()
    for name, gradient in alone.gradients.items():
        assert torch.equal(gradient, shared.gradients[name])


@pytest.mark.cases(4)
@pytest.mark.parametrize("name", IN_ROWS)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_nan_in_one_packed_sequence_does_not_spread(name: str, index: int, trainer_of: Any) -> None:
    trainer, _ = trainer_of(name)
    rng = np.random.default_rng(0)
    batch = [
        Tokens(*rng.integers(0, VOCAB_SIZE, (2, length)).tolist(), np.ones(length, np.float32), 0)
        for length in (20, 11, 30)
    ]
    place = index if trainer.base.is_padded else (0, [slice(0, 20), slice(20, 31), slice(31, 61)][index])

    def set_nan(module: nn.Module, inputs: Any, embeddings: Tensor) -> Tensor:
        with_nan = embeddings.clone()
        with_nan[place] = torch.nan
        return with_nan

    before = packed_logprobs(trainer, batch)
    hook = trainer.base.model.get_input_embeddings().register_forward_hook(set_nan)
    after = packed_logprobs(trainer, batch)
    hook.remove()
    assert np.isnan(after[index]).all()
    assert_others_unchanged(name, index, before, after)


def assert_others_unchanged(name: str, index: int, before: list[np.ndarray], after: list[np.ndarray]) -> None:
    """Asserts bit-identical results, or equal to rounding for experts, whose computation depends on how
    many tokens each one gets."""
    del before[index], after[index]
    for one, other in zip(before, after, strict=True):
        if name in EXPERTS or name == "qwen3_next":
            np.testing.assert_allclose(other, one, rtol=1e-6)
        else:
            assert other.tobytes() == one.tobytes()


# -- what can be packed, padded, or neither -----------------------------------------------------


def planned(base: BaseModel, lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Returns the micro-batches of sequences that share no beginning."""
    families = [PrefixFamily([index], [length], [0]) for index, length in enumerate(lengths)]
    plan = microbatches.plan(base, families, max_tokens)
    return sorted([family.indices[0] for family in microbatch] for microbatch in plan)


@pytest.mark.cases(8)
@pytest.mark.parametrize("name", PACKED | RECURRENT | EXPERTS | LONGROPE)
def test_models_that_support_packing_are_packed(name: str, trainer_of: Any) -> None:
    base = trainer_of(name)[0].base
    assert base.is_packed
    assert not base.is_padded


@pytest.mark.cases(4)
@pytest.mark.parametrize("name", PACKED | RECURRENT | EXPERTS)
def test_models_that_support_sharing_share_what_sequences_begin_with(name: str, trainer_of: Any) -> None:
    """A trial when the model is loaded decides."""
    assert BaseModel(trainer_of(name)[0].base.name).min_shared_tokens == MIN_SHARED_TOKENS


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in PADDED), ("stablelm-faint", "bfloat16")]
)
def test_a_model_that_packing_would_change_is_padded(name: str, dtype: str, trainer_of: Any) -> None:
    """Also if the effect of a neighbour is below the rounding of bfloat16."""
    base = BaseModel(trainer_of(name)[0].base.name, EngineOptions(dtype=dtype))
    assert base.is_packed
    assert base.is_padded


def test_sequences_that_longrope_encodes_differently_share_no_row(trainer_of: Any) -> None:
    base = trainer_of("phi3-longrope")[0].base
    assert planned(base, [16, 17, 3, 30], max_tokens=1000) == [[0, 2], [1, 3]]
    lengths = (16, 17, 10, 30)
    found = families([np.arange(length) for length in lengths], 1, microbatches.rope_kinds(base, lengths))
    assert [sorted(family.indices) for family in found] == [[0, 2], [1, 3]]


def test_a_padded_row_counts_its_padding(trainer_of: Any) -> None:
    base = trainer_of("stablelm")[0].base
    assert planned(base, [9, 30, 10, 31, 10], max_tokens=62) == [[0, 2, 4], [1, 3]]
    families = [PrefixFamily([0], [9], [0]), PrefixFamily([1], [10], [0])]
    assert microbatches.size_of(base, families, lambda length: length**2) == 200


def test_a_model_that_padding_would_change_runs_one_sequence_at_a_time_and_logs_it(
    trainer_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Its logits depend on the number of tokens that it is given."""
    base = BaseModel(trainer_of("stablelm")[0].base.name, EngineOptions(dtype="float32"))
    hook = base.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, embeddings: embeddings + 0.01 * embeddings.shape[1] * module.weight[1]
    )
    with caplog.at_level("INFO", logger="cookbook.engine.model.architecture_probe"):
        base._probe_architecture()
    hook.remove()
    assert not base.is_packed
    by_level = {
        r.levelname: r.message for r in caplog.records if r.name == "cookbook.engine.model.architecture_probe"
    }
    assert by_level["INFO"].startswith(f"{base.name} runs one sequence at a time")
    assert "its gradients would move by" in by_level["INFO"]
    assert f"{base.name} falls back to a slower way" in by_level.get("WARNING", "")
    assert planned(base, [9, 30], max_tokens=1000) == [[0], [1]]


# -- in half precision ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "phi"])
def test_bfloat16_gradients_are_as_accurate_as_those_of_peft(
    name: str, trainer_of: Any, make_trainer: Callable[..., Trainer], make_data: Any
) -> None:
    """The truth is computed in float64 from the same rounded weights."""
    base, plain = trainer_of(name)[0].base.name, trainer_of(name)[1]
    data = make_data(VOCAB_SIZE, [40, 30, 50])

    def plain_gradients(dtype: torch.dtype) -> Tensor:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).to(dtype)
        peft_model = PeftModel.from_pretrained(model, plain.adapter_folder, is_trainable=True).eval()
        if dtype == torch.float64:
            peft_model = peft_model.double()
        for datum in data:
            logits_TV = peft_model(torch.tensor([datum.model_input.to_ints()]), use_cache=False).logits[0]
            targets_T1 = datum.loss_fn_inputs["target_tokens"].to_torch()[:, None]
            logprobs_T = logits_TV.to(torch.promote_types(dtype, torch.float32)).log_softmax(-1)
            weights_T = datum.loss_fn_inputs["weights"].to_torch()
            (-(weights_T * logprobs_T.gather(1, targets_T1)[:, 0]).sum()).backward()
        parameters = {n.replace(".default.", "."): p for n, p in peft_model.named_parameters()}
        return torch.cat([parameters[n].grad.double().flatten() for n in trainer.adapter.weights])

    trainer = make_trainer(base, options={"dtype": "bfloat16"})
    truth, of_peft = plain_gradients(torch.float64), plain_gradients(torch.bfloat16)
    trainer.forward_backward(trainer.check(data, "cross_entropy", None))
    found = torch.cat([p.grad.double().flatten() for p in trainer.adapter.weights.values()])
    assert (found - truth).norm() < 1.5 * (of_peft - truth).norm()
