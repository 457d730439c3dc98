"""What docs/models.md claims of a family, tried on its tiny model against plain transformers and PEFT.

Each column is a function of a `Subject`. It returns what the page shows, and raises if its claim does not
hold.

Shape suffixes: B sequences, T positions of a sequence, V vocabulary.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import io
import json
import logging
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import families
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from family_table import VOCAB_SIZE
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer
from transformers.pytorch_utils import Conv1D

from cookbook.clients.service import ServiceClient
from cookbook.clients.training import TrainingClient
from cookbook.engine.model.stacked_4bit import StackedIn4Bits
from cookbook.export import export
from cookbook.export.config import ExportConfig
from cookbook.types import AdamParams, Datum, ModelInput, SamplingParams

ADAM = AdamParams(learning_rate=0.02)
NUM_TOKENS = 373
"""The number of tokens that the tokenizer has. The model has more rows."""


def make_data(lengths: Sequence[int], seed: int = 0) -> list[Datum]:
    """Returns sequences of random tokens, of which about 3 in 5 are trained, with different weights."""
    rng = np.random.default_rng(seed)
    data = []
    for length in lengths:
        tokens = rng.integers(3, NUM_TOKENS, length + 1)
        weights = (rng.random(length) < 0.6) * rng.choice([0.5, 1.0, 2.0], length)
        inputs = {"target_tokens": tokens[1:], "weights": weights.astype(np.float32)}
        data.append(Datum(ModelInput.from_ints(tokens[:-1]), inputs))
    return data


def _branches(data: Sequence[Datum], num_shared: Sequence[int]) -> list[Datum]:
    """Returns sequences that begin with so many tokens of the first one."""
    tokens = [datum.model_input.to_ints() for datum in data]
    return [
        Datum(ModelInput.from_ints([*tokens[0][:number], *own[number:]]), datum.loss_fn_inputs)
        for datum, own, number in zip(data, tokens, num_shared, strict=True)
    ]


SHORT = make_data((9, 41, 20, 33))
TREE = _branches(make_data((41, 33, 19, 29)), (0, 24, 19, 20))
PROMPTS = (list(range(20, 48)), [7, 9, 30], list(range(100, 117)))


@contextlib.contextmanager
def heard(logger_name: str) -> Iterator[list[str]]:
    """Collects what a logger says meanwhile."""
    logger, said = logging.getLogger(logger_name), []
    handler, level = logging.Handler(), logger.level
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class Subject:
    """A published model, a training client on it, and what each column needs more than once."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.published = families.save(name, folder / "published")
        self.class_name: str = json.loads((self.published / "config.json").read_text(encoding="utf-8"))[
            "architectures"
        ][0]

    @functools.cached_property
    def client(self) -> TrainingClient:
        """A client at default settings, after one step, so that no B matrix is zero."""
        with heard("cookbook.engine.model.architecture_probe") as self.said:
            client = self.service().create_lora_training_client(str(self.published), rank=4, seed=0)
        client.forward_backward(SHORT, "cross_entropy").result()
        client.optim_step(ADAM).result()
        return client

    def why_not_packed(self) -> str:
        """Returns the reason that the engine logs."""
        said = next((text for text in self.said if "one sequence at a time" in text), "")
        return said.partition("(")[2].removesuffix(").")

    @property
    def has_client(self) -> bool:
        return "client" in self.__dict__

    @functools.cached_property
    def checkpoint(self) -> str:
        return self.client.save_weights_for_sampler("checked").result().path

    @functools.cached_property
    def adapted(self) -> Any:
        """The published model with the saved adapter, as plain transformers and PEFT load both."""
        return PeftModel.from_pretrained(self.plain(), self.checkpoint, is_trainable=True).eval()

    def service(self, **options: Any) -> ServiceClient:
        return ServiceClient(checkpoint_dir=self.folder / "checkpoints", **options)

    def plain(self, folder: str | Path | None = None) -> Any:
        """Returns a model of the published class, in float32, as plain transformers loads it."""
        kind = getattr(transformers, self.class_name)
        model, report = kind.from_pretrained(
            folder or self.published, dtype=torch.float32, output_loading_info=True
        )
        assert not report["missing_keys"], f"transformers lacks {min(report['missing_keys'])}"
        if hasattr(model.config, "rescale_every"):
            model.config.rescale_every = 0  # RWKV computes so in training mode, where PEFT is right
        return model.eval()


# -- the truth ----------------------------------------------------------------------------------


def plain_logprobs(model: Any, datum: Datum) -> Tensor:
    """Returns the log-probability of each target: [T]."""
    targets_T = datum.loss_fn_inputs["target_tokens"].to_torch().long()
    logits_TV = model(input_ids=torch.tensor([datum.model_input.to_ints()]), use_cache=False).logits[0]
    dtype = torch.promote_types(logits_TV.dtype, torch.float32)
    return -F.cross_entropy(logits_TV.to(dtype), targets_T, reduction="none")


def plain_gradients(model: Any, data: Sequence[Datum]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Returns the gradient of the loss by name, and the sizes of its summands, one for each sequence."""
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    gradients = {name: torch.zeros_like(weight) for name, weight in named.items()}
    sizes = dict.fromkeys(named, 0.0)
    for datum in data:
        weights_T = datum.loss_fn_inputs["weights"].to_torch()
        loss = -(weights_T * plain_logprobs(model, datum)).sum()
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for name, gradient in zip(named, found, strict=True):
            if gradient is not None:
                gradients[name] += gradient
                sizes[name] += float(gradient.abs().max())
    return gradients, sizes


def assert_gradients(
    found: Mapping[str, Tensor | None],
    expected: Mapping[str, Tensor],
    sizes: Mapping[str, float],
    rounding: Callable[[], float] = lambda: 0.0,
) -> str:
    """Asserts equality to 1e-4 of the summands' sizes, and returns the largest difference.

    More is allowed where plain transformers differs by more from itself in float64, which `rounding` returns.
    """
    floor = 1e-3 * max(sizes.values())
    missing = [name for name, size in sizes.items() if size > floor and found.get(name) is None]
    assert not missing, f"no gradient for {missing[0]}"
    differences = {
        name: float((gradient - expected[name]).abs().max()) / max(size, floor)
        for name, size in sizes.items()
        if (gradient := found.get(name)) is not None
    }
    name = max(differences, key=differences.__getitem__)
    _assert_within_rounding(differences[name], 1e-4, rounding, f"{name} differs")
    return f"{differences[name]:.0e}"


def _assert_within_rounding(
    difference: float, tolerance: float, rounding: Callable[[], float], what: str
) -> None:
    """Asserts a difference below a tolerance, or that of two roundings, which is measured if needed."""
    if difference <= tolerance:
        return
    rounded = rounding()
    assert difference <= 2 * rounded <= 1e-3, f"{what} by {difference:.0e}, where rounding is {rounded:.0e}"


def in_float64(model: Any) -> Any:
    """Returns a copy of a model that computes in float64."""
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")  # grouped products do not take float64
    return exact


def rounding_of_gradients(
    model: Any, data: Sequence[Datum], expected: Mapping[str, Tensor], sizes: Mapping[str, float]
) -> float:
    """Returns the largest rounding of gradients of plain transformers, relative to the summands' sizes."""
    exact, _ = plain_gradients(in_float64(model), data)
    floor = 1e-3 * max(sizes.values())
    return max(
        float((exact[name] - gradient).abs().max()) / max(sizes[name], floor)
        for name, gradient in expected.items()
    )


def gradients_of(client: TrainingClient, data: Sequence[Datum]) -> dict[str, Tensor | None]:
    """Returns the gradients that the engine adds up for a batch, and discards them there."""
    client.forward_backward(list(data), "cross_entropy").result()
    weights = client._trainer.adapter.weights
    found = {name: None if w.grad is None else w.grad.clone() for name, w in weights.items()}
    client._trainer.discard_gradients()
    return found


@torch.no_grad()
def assert_same_logprobs(
    client: TrainingClient, model: Any, tolerance: float = 1e-4, same: Callable[[], Any] | None = None
) -> None:
    """Asserts equality with plain transformers, to the tolerance or to the model's own rounding.

    `same` returns a model with the same exact numbers, whose rounding counts too.
    """
    outputs = client.forward(SHORT, "cross_entropy").result().loss_fn_outputs
    found = torch.cat([output["logprobs"].to_torch() for output in outputs])
    expected = torch.cat([plain_logprobs(model, datum) for datum in SHORT])

    def rounding_of(one: Any) -> float:
        exact_model = in_float64(one)
        return max(
            float((plain_logprobs(exact_model, datum) - plain_logprobs(one, datum)).abs().max())
            for datum in SHORT
        )

    def rounding() -> float:
        return max(map(rounding_of, [model] if same is None else [model, same()]))

    difference = float((found - expected).abs().max())
    _assert_within_rounding(difference, tolerance, rounding, "log-probabilities differ")


# -- the columns --------------------------------------------------------------------------------


def loads(subject: Subject) -> str:
    """The published folder loads in its class, and a new adapter changes nothing."""
    model = subject.client._trainer.base.model
    found = type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__
    assert found == subject.class_name, f"it is loaded as {found}"
    return found


def share_adapted(subject: Subject) -> str:
    """The share of the weights of the decoder's layers that carries an adapter, as PEFT loads it.

    Embeddings, the head, norms, convolutions (less than 1% of the weights at published sizes) and towers are
    not counted, nor weights that get no gradient from text (indexers, which choose positions, and attention
    to images). Linear layers are named on which PEFT itself refuses an adapter in this architecture.
    """
    decoder = _decoder(subject.adapted.base_model.model)
    skipped = (torch.nn.Embedding, torch.nn.Conv1d)
    not_counted = {id(m.weight) for m in decoder.modules() if isinstance(m, skipped)}
    modules = [module for module in decoder.modules() if isinstance(module, LoraLayer)]
    adapted = {id(_adapted_weight(module)): _adapted_weight(module) for module in modules}
    others = {
        name.replace(".base_layer", ""): weight
        for name, weight in decoder.named_parameters()
        if weight.ndim > 1 and "lora_" not in name and id(weight) not in not_counted | adapted.keys()
    }
    sizes = {name: others[name].numel() for name in _with_gradient(subject, others)}
    refused = {name: size for name, size in sizes.items() if _is_refused_by_peft(subject.adapted, name)}
    total = sum(sizes.values()) + sum(weight.numel() for weight in adapted.values())
    share = 1 - sum(sizes.values()) / total
    largest = max(sizes.keys() - refused.keys(), key=sizes.__getitem__, default="")
    assert share + sum(refused.values()) / total >= 0.85, f"{share:.0%}: not {largest}"
    layers = sorted({name.split(".")[-2] for name in refused})
    return f"{share:.0%}" + (f" (PEFT refuses {', '.join(layers)})" if layers else "")


def _with_gradient(subject: Subject, weights: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of those weights on which the log-probabilities of some text depend."""
    if not weights:
        return []
    for weight in weights.values():
        weight.requires_grad_(True)
    loss = plain_logprobs(subject.adapted, SHORT[1]).sum()
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    for weight in weights.values():
        weight.requires_grad_(False)
    return [name for name, gradient in zip(weights, found, strict=True) if gradient is not None]


def _is_refused_by_peft(adapted: Any, name: str) -> bool:
    """Returns whether PEFT raises for an adapter on the layer of a weight, by its name."""
    tuner, leaf = adapted.base_model, name.split(".")[-2]
    try:
        tuner._check_target_module_compatiblity(adapted.peft_config["default"], tuner.model, leaf)
    except ValueError:
        return True
    return False


def _decoder(model: Any) -> Any:
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else model.base_model  # not ModernBERT's head


def _adapted_weight(module: Any) -> Tensor:
    name = getattr(module, "parameter_name", None)
    base = module.get_base_layer()
    return getattr(base, name) if name else base.weight


def gradients(subject: Subject) -> str:
    """The gradients of a batch equal those of plain transformers and PEFT, one sequence at a time."""
    return _compare_gradients(subject, SHORT)


def shared(subject: Subject) -> str:
    """The same for sequences that share beginnings, which are computed once, or `each` where they are not."""
    _compare_gradients(subject, TREE)
    return "yes" if subject.client._trainer.base.min_shared_tokens else "each"


def _compare_gradients(subject: Subject, data: Sequence[Datum]) -> str:
    model = subject.adapted
    expected, sizes = plain_gradients(model, data)
    weights = gradients_of(subject.client, data)
    found = {}
    for name in expected:
        own = name.replace(".default.", ".")
        found[name] = weights.get(own, weights.get(own.removeprefix("base_model.model.")))
    return assert_gradients(
        found, expected, sizes, lambda: rounding_of_gradients(model, data, expected, sizes)
    )


def packed(subject: Subject) -> str:
    """Sequences share a row. The figure is the time of a step, as a share of that of a right-padded batch."""
    rng = np.random.default_rng(1)
    data = make_data(rng.integers(32, 257, 16).tolist(), seed=2)
    assert subject.client._trainer.base.is_packed, f"one sequence at a time: {subject.why_not_packed()}"

    def engine() -> None:
        subject.client.forward_backward(data, "cross_entropy").result()

    def plain() -> None:
        _padded_step(subject.adapted, data)

    seconds = {engine: float("inf"), plain: float("inf")}
    for _ in range(3):
        for step in seconds:
            start = time.process_time()
            step()
            seconds[step] = min(seconds[step], time.process_time() - start)
    subject.client._trainer.discard_gradients()
    subject.adapted.zero_grad()
    ratio = seconds[engine] / seconds[plain]
    assert ratio <= 1, f"{ratio:.2f} of the time"
    return f"{ratio:.2f}"


def _padded_step(model: Any, data: Sequence[Datum]) -> None:
    lengths = [len(datum.model_input.to_ints()) for datum in data]
    tokens_BT = torch.zeros(len(data), max(lengths), dtype=torch.long)
    targets_BT = torch.zeros_like(tokens_BT)
    weights_BT = torch.zeros(tokens_BT.shape)
    mask_BT = torch.zeros_like(tokens_BT)
    for row, (length, datum) in enumerate(zip(lengths, data, strict=True)):
        tokens_BT[row, :length] = torch.tensor(datum.model_input.to_ints())
        targets_BT[row, :length] = datum.loss_fn_inputs["target_tokens"].to_torch()
        weights_BT[row, :length] = datum.loss_fn_inputs["weights"].to_torch()
        mask_BT[row, :length] = 1
    logits_BTV = model(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False).logits
    losses = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none")
    (losses * weights_BT.flatten()).sum().backward()


@torch.no_grad()
def sampling(subject: Subject) -> str:
    """Greedy tokens equal those of `generate`, and log-probabilities those of a forward pass.

    Where the cache of `generate` leads to other tokens than the forward pass, the forward pass counts and the
    cell says so. A model's own cache may let a reply attend to fewer tokens than a forward pass does. Then
    tokens and log-probabilities equal those of `generate`, and the cell says so.
    """
    says = "yes"
    sampler = subject.client.save_weights_and_get_sampling_client()
    params = SamplingParams(max_tokens=16, temperature=0.0, stop=[])
    futures = [sampler.sample(ModelInput.from_ints(prompt), 1, params) for prompt in PROMPTS]
    model = subject.adapted
    for prompt, future in zip(PROMPTS, futures, strict=True):
        (sequence,) = future.result().sequences
        found = list(sequence.tokens)
        logits_TV = model(input_ids=torch.tensor([prompt + found]), use_cache=False).logits[0].float()
        scores_TV = logits_TV.log_softmax(-1)[len(prompt) - 1 : -1]
        expected_T = scores_TV.gather(1, torch.tensor(found)[:, None])[:, 0]
        difference = float((torch.tensor(sequence.logprobs) - expected_T).abs().max())
        generated = model.generate(
            input_ids=torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=16,
            eos_token_id=None,
            pad_token_id=0,
            suppress_tokens=list(range(NUM_TOKENS, VOCAB_SIZE)) if max(found) < NUM_TOKENS else None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        expected = generated.sequences[0, len(prompt) :].tolist()
        if difference > 1e-3 and found == expected and _has_own_window(model):
            steps_TV = torch.cat(generated.logits).float().log_softmax(-1)
            expected_T = steps_TV.gather(1, torch.tensor(found)[:, None])[:, 0]
            difference = float((torch.tensor(sequence.logprobs) - expected_T).abs().max())
            says = "yes, as `generate` (its forward pass differs from it)"
        assert difference <= 1e-3, f"log-probabilities differ by {difference:.0e}"
        if expected[-1] == 2:  # Janus ends there in any case
            found = found[: len(expected)]
        if found != expected:
            place = _first_difference(found, expected)
            scores_V = scores_TV[place - 1]
            gap = float(scores_V[found[place - 1]] - scores_V[expected[place - 1]])
            is_greedy = bool((scores_TV.amax(-1) - expected_T < 1e-5).all())
            if is_greedy and gap > 1e-5:
                says = "yes, as its forward pass (`generate` differs from it)"
            else:  # a tie of two tokens may be broken by rounding, and all behind it differs
                assert abs(gap) <= 1e-3, f"other tokens than generate from the {place}th"
    sampler.close()
    return says


def _has_own_window(model: Any) -> bool:
    """Returns whether the model makes a cache with sliding layers of a kind of its own."""
    layers = DynamicCache(config=model.config.get_text_config()).layers
    kinds = {type(layer) for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)}
    return bool(kinds - {DynamicSlidingWindowLayer})


def _first_difference(found: Sequence[int], expected: Sequence[int]) -> int:
    return next(i for i, pair in enumerate(zip(found, expected, strict=True), 1) if pair[0] != pair[1])


def resumes(subject: Subject) -> str:
    """A saved state resumes to the bit, and PEFT loads it onto the published class with equal logits."""
    assert_same_logprobs(subject.client, subject.adapted)
    with torch.no_grad(), subject.adapted.disable_adapter():
        without = plain_logprobs(subject.adapted, SHORT[1])
    with torch.no_grad():
        assert (plain_logprobs(subject.adapted, SHORT[1]) - without).abs().max() > 1e-3, (
            "PEFT changes nothing"
        )
    first = subject.service().create_lora_training_client(str(subject.published), rank=4, seed=1)
    _train(first, range(2))
    path = first.save_state("state").result().path
    _train(first, range(2, 4))
    second = subject.service().create_training_client_from_state_with_optimizer(path)
    _train(second, range(2, 4))
    one, other = first._trainer.adapter.weights, second._trainer.adapter.weights
    assert one.keys() == other.keys()
    changed = [name for name, weight in one.items() if not torch.equal(weight, other[name])]
    assert not changed, f"{changed[0]} differs after a resume"
    return "yes"


def _train(client: TrainingClient, seeds: range) -> None:
    for seed in seeds:
        client.forward_backward(make_data((9, 30, 17), seed), "cross_entropy")
        client.optim_step(ADAM).result()


def merged(subject: Subject) -> str:
    """The merged export has the logits of the adapter, and each tensor of the published files."""
    folder = subject.folder / "merged"
    config = ExportConfig(checkpoint=subject.checkpoint, to=str(folder), format="merged")
    with contextlib.redirect_stdout(io.StringIO()):
        asyncio.run(export.main(config))
    _assert_same_tensors(subject.published, folder, subject.plain().all_tied_weights_keys)
    assert_same_logprobs(subject.client, subject.plain(folder), same=lambda: subject.adapted)
    return "yes"


def _assert_same_tensors(published: Path, folder: Path, may_be_added: Collection[str] = ()) -> None:
    before, after = _tensors(published), _tensors(folder)
    missing = sorted(before.keys() - after.keys())
    assert not missing, f"{len(missing)} of {len(before)} tensors missing, first {missing[0]}"
    added = sorted(
        name
        for name in after.keys() - before.keys()
        if name not in may_be_added and not name.endswith(("lm_head.weight", "embed_out.weight"))
    )
    assert not added, f"{len(added)} other tensors, first {added[0]}"
    other = [name for name in before if _kind(before[name]) != _kind(after[name])]
    assert not other, f"{other[0]} is {_kind(after[other[0]])}, not {_kind(before[other[0]])}"
    untrained = [name for name in before if re.search(r"vision|visual|projector|merger|mtp|\.eh_proj", name)]
    changed = [name for name in untrained if not torch.equal(before[name], after[name])]
    assert not changed, f"{changed[0]} has other values"
    architectures = [
        json.loads((each / "config.json").read_text(encoding="utf-8"))["architectures"]
        for each in (published, folder)
    ]
    assert architectures[0] == architectures[1], f"its class is {architectures[1]}"


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _kind(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"


def rank_0(subject: Subject) -> str:
    """A full fine-tune has the gradients of plain transformers, and its checkpoint each published tensor."""
    client = subject.service().create_lora_training_client(str(subject.published), rank=0)
    found = gradients_of(client, SHORT)
    model = subject.plain()
    expected, sizes = plain_gradients(model, SHORT)
    assert_gradients(found, expected, sizes, lambda: rounding_of_gradients(model, SHORT, expected, sizes))
    _train(client, range(2))
    path = Path(client.save_weights_for_sampler("full").result().path)
    _assert_same_tensors(subject.published, path)
    assert_same_logprobs(client, subject.plain(path))
    return "yes"


def nf4(subject: Subject) -> str:
    """In 4 bits, log-probabilities are those of the model with rounded weights, and an adapter learns."""
    service = subject.service(quantization="nf4")
    client = service.create_lora_training_client(str(subject.published), rank=4, seed=0)
    model = subject.plain()
    assert _round_to_nf4(model, client._trainer.base.model) > 0, "nothing is in 4 bits"
    assert_same_logprobs(client, model, 2e-3)
    losses = []
    for _ in range(4):
        losses.append(client.forward_backward(SHORT, "cross_entropy").result().metrics["loss:sum"])
        client.optim_step(ADAM).result()
    assert losses[-1] < losses[0], "it does not learn"
    return "yes"


@torch.no_grad()
def _round_to_nf4(model: Any, quantized: Any) -> int:
    """Rounds those weights of `model` that `quantized` holds in 4 bits, and returns their number."""
    own = dict(model.named_parameters())
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    num_rounded = 0
    for name, weight in quantized.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if weight.dtype == torch.uint8:
            matrices = [own[name].T if name in transposed else own[name]]
        elif isinstance(weight, StackedIn4Bits):
            matrices = list(own[name].view(len(weight.states), -1, own[name].shape[-1]))
        else:
            continue
        for matrix in matrices:
            packed, state = quantize_4bit(matrix.contiguous(), quant_type="nf4", compress_statistics=True)
            matrix.copy_(dequantize_4bit(packed, state))
            num_rounded += matrix.numel()
    return num_rounded


COLUMNS: dict[str, Callable[[Subject], str]] = {
    "class": loads,
    "adapted": share_adapted,
    "gradients": gradients,
    "packed": packed,
    "shared": shared,
    "sampling": sampling,
    "resumes": resumes,
    "merged": merged,
    "rank 0": rank_0,
    "nf4": nf4,
}
