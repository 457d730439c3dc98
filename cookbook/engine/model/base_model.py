"""A base model: its weights, its adapters, and its forward and backward pass.

Shape suffixes: N tokens of a packed row, P scored positions of its sequences, S hidden states with targets
that are scored (`packing`), D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cookbook import models
from cookbook.engine import devices, processes
from cookbook.engine.model import (
    architecture,
    attention,
    backward_trial,
    fsdp,
    fused,
    linear_scan,
    loss_scaling,
    unembedding,
    vocabulary,
)
from cookbook.engine.model.adapters import GLOBAL_STATE, Adapters
from cookbook.engine.model.architecture import LogitScaling
from cookbook.engine.model.attention import AttentionLayout
from cookbook.engine.model.compiling import compile_layers
from cookbook.engine.model.loading import load_model, return_freed_memory
from cookbook.engine.model.memory import (
    checkpointed_layers,
    decoder_layers,
    in_gib,
    is_out_of_memory,
    usable_memory,
)
from cookbook.engine.model.packing import PackedBatch, TokenSequence, copy_to, pack
from cookbook.engine.model.peft_layers import projection_of
from cookbook.engine.model.peft_settings import is_same
from cookbook.engine.model.prefix_tree import MIN_SHARED_TOKENS, families
from cookbook.engine.model.recurrence import RecurrentLayers
from cookbook.engine.model.text_part import by_published_names, frozen_parameters, text_decoder
from cookbook.engine.model.unembedding import BlockSizes, Head, Scores, TokenLoss
from cookbook.engine.options import EngineOptions
from cookbook.errors import ConfigError, ModelError

logger = logging.getLogger(__name__)

_FAILURES = (AssertionError, AttributeError, KeyError, TypeError, ValueError, RuntimeError)
"""What a model raises in a trial that does not fit it."""


class BaseModel:
    """A model that is loaded once. All training and sampling clients on it share its weights."""

    is_packed = False
    """Whether sequences can share a row."""
    min_shared_tokens: int | None = None
    """The shortest beginning that sequences share in a row, or None if they share none."""
    is_padded = False
    """Whether the sequences of a row run as a batch, padded to the longest, through the model's own
    attention. It is set where that attention cannot keep the sequences of one row apart."""
    has_plain_head = False
    """Whether logits can be computed in blocks."""
    # `sampling.decoder_probe` sets these four when the model is first sampled from.
    decodes_packed: bool | None = None
    """Whether sampled sequences can share a row too."""
    make_decoder: Callable[[BaseModel], Any] | None = None
    """The factory of the decoder."""
    cache_bytes = (0, 0)
    """The bytes of one cached position and of one sequence's recurrent states, or zeros if unknown."""
    reuses_prompts = False
    """Whether prompts reuse the keys and values of texts that begin alike."""

    def __init__(
        self,
        model_name: str,
        options: EngineOptions | None = None,
        is_trained: bool = False,
        add_tokens: tuple[str, ...] = (),
    ) -> None:
        """Loads the model, with rows for `add_tokens`.

        `is_trained` says that its own weights are trained, which needs more memory.
        """
        self.name = model_name
        self.add_tokens = add_tokens
        self.options = options or EngineOptions()
        self.world = processes.current().duplicate()
        self.device, self.dtype = devices.resolve(self.options)
        self.tokenizer = models.get_tokenizer(model_name, add_tokens)
        with GLOBAL_STATE:
            self.is_sharded = fsdp.should_shard(
                self.options, self.world, model_name, self.device, self.dtype, is_trained
            )
            """Whether the weights are sharded over several processes."""
            self.model: Any = self._load(is_trained)
        self.vocab_size: int = self.model.get_input_embeddings().weight.shape[0]
        self.num_logits: int = getattr(self.model.get_output_embeddings(), "out_features", self.vocab_size)
        self.context_length: int = (
            getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**20
        )
        self._decoder = text_decoder(self.model)
        linear_scan.install(self._decoder)
        self.recurrent = RecurrentLayers(self._decoder)
        self.adapters = Adapters(self.model, model_name, self.tokenizer)
        self.longrope_thresholds = architecture.longrope_thresholds(self.model.config.get_text_config())
        self.block_sizes = BlockSizes.on(self.device)
        self._logit_scaling = LogitScaling()
        self.prompt_trees: weakref.WeakSet[Any] = weakref.WeakSet()
        """What samplers keep of prompts (`sampling.prompt_tree`)."""
        with self.adapters.noting_unused_layers():
            self._probe_architecture()
        fsdp.reshard(self.model)
        self._prepare_layers()
        return_freed_memory()

    def _load(self, is_trained: bool) -> Any:
        """Returns the model. Raises ModelError, with the memory that it needs, if that is not there."""
        try:
            return self._load_weights(is_trained)
        except (ModelError, RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error.__cause__ if isinstance(error, ModelError) else error):
                raise
            needed = fsdp.bytes_needed(self.name, self.dtype, is_trained)
            raise ModelError(
                f"{self.name} does not fit in the memory of {self.device}: {in_gib(needed)} are needed "
                f"{'to train all its weights' if is_trained else 'for its weights'} in "
                f"{str(self.dtype).removeprefix('torch.')}, and {in_gib(usable_memory(self.device))} may be "
                f"used, less what other programs hold. Use "
                f"{'lora_rank of at least 1' if is_trained else 'quantization=nf4'}, a smaller model, or "
                f"several devices with shard=full."
            ) from None

    def _load_weights(self, is_trained: bool) -> Any:
        if not self.is_sharded:
            model = load_model(self.name, self.device, self.dtype, self.options.quantization)
            self._add_rows(model)
            return model
        with self.loading_in_turn():
            model = load_model(self.name, torch.device("cpu"), self.dtype)
            self._add_rows(model)
            for weight in {*model.parameters()} - frozen_parameters(model):
                weight.requires_grad_(is_trained)
            fsdp.shard(model, self.world, self.device, self.name)
        return model

    def _add_rows(self, model: Any) -> None:
        if self.add_tokens:
            base_tokenizer = models.get_tokenizer(self.name)
            vocabulary.add_rows(model, self.tokenizer, base_tokenizer, self.add_tokens, self.name)
            model.requires_grad_(False)

    @contextlib.contextmanager
    def loading_in_turn(self) -> Iterator[None]:
        """Limits the body to one process of a machine at a time if the model is sharded.

        A sharded model is loaded with all weights in memory.
        """
        with self.world.one_after_another() if self.is_sharded else contextlib.nullcontext():
            yield

    def has_weight(self, weight: Tensor, module: str) -> bool:
        """Returns whether the module of this name has this weight, below any adapters."""
        (published,) = by_published_names(self.model, {module: None})
        found = dict(self.model.named_modules()).get(published)
        own = getattr(getattr(found, "base_layer", found), "weight", None)
        if own is None or own.shape != weight.shape:
            return False
        part = fsdp.local_part(fsdp.part_like(weight, own))
        return is_same(part, fsdp.local_part(own))

    def _prepare_layers(self) -> None:
        layers = decoder_layers(self.model)
        if not layers and (self.options.compile or self.options.gradient_checkpointing == "on"):
            raise ConfigError(
                f"{self.name} has no layers that transformers can checkpoint or compile. Use compile=False "
                f"and gradient_checkpointing=off."
            )
        if self.options.compile:
            compile_layers(layers)
        elif self.device.type == "cuda":
            fused.install(self._decoder)

    # -- what the architecture allows -------------------------------------------------------

    @torch.no_grad()
    def _probe_architecture(self) -> None:
        """Sets `has_plain_head`, `is_packed` and `is_padded`, and selects the attention accordingly.

        A config does not describe an architecture completely (sinks, recurrent layers, scaled logits). So two
        short sequences are run, with windows that are shorter, and each optimisation is used only if the
        results equal those of the model itself. Sequences are packed, or else padded, or else run one at a
        time.
        """
        generator = torch.Generator().manual_seed(0)
        sequences: list[TokenSequence] = []
        for length in (13, 6):
            ids_T = torch.randint(self.vocab_size, (length,), generator=generator).numpy()
            if sequences:  # they share a beginning
                ids_T[:3] = sequences[0].tokens_T[:3]
            sequences.append(TokenSequence(ids_T, ids_T, np.ones(length, np.float32), {}))
        alone = [pack([sequence], self.device, trained_only=False) for sequence in sequences]
        self.is_packed = self.is_padded = False
        with contextlib.ExitStack() as spans:
            spans.enter_context(architecture.short_spans(self._decoder, self.model.config.get_text_config()))
            try:
                expected = [self.logprobs_of_whole_model(batch) for batch in alone]
            except _FAILURES as error:
                logger.debug("%s is tried with its own windows (%s).", self.name, error)
                self.discard_pass()
                spans.close()
                expected = self._logprobs_of_text_alone(alone)
            self._check_causal(sequences[0], expected[0])
            self._choose_passes(sequences, alone, torch.cat(expected), self._gradients_alone(alone))

    def _logprobs_of_text_alone(self, alone: list[PackedBatch]) -> list[Tensor]:
        """Raises ModelError for a model that needs more than text, such as a picture."""
        try:
            return [self.logprobs_of_whole_model(batch) for batch in alone]
        except (TypeError, ValueError) as error:
            raise ModelError(
                f"{self.name} ({type(self.model).__name__}) does not run on text alone: {error}\n"
                f"Training and sampling give a model nothing but text. Choose a model that chats without "
                f"pictures or sound."
            ) from error

    def _choose_passes(
        self,
        sequences: list[TokenSequence],
        alone: list[PackedBatch],
        expected_S: Tensor,
        gradients: list[Tensor],
    ) -> None:
        """Does what `_probe_architecture` says, given the results of the sequences run alone: their
        log-probabilities, and the gradients of the embeddings, or none if there is no backward pass."""

        def why_not(compute: Callable[[], Tensor]) -> str | None:
            try:
                found_S = compute()
            except _FAILURES as error:
                self.discard_pass()
                logger.debug("%s failed in a trial (%s: %s).", self.name, type(error).__name__, error)
                return str(error) if isinstance(error, ValueError) else "it fails in a trial"
            difference = ((found_S - expected_S).abs() / expected_S.abs()).max().item()
            tolerance = 1e-4 if self.dtype == torch.float32 else 0.05
            return (
                None if difference <= tolerance else f"its log-probabilities would move by {difference:.2%}"
            )

        self.has_plain_head = True
        reason = why_not(lambda: self._logprobs_of_plain_head(alone))
        if reason is not None:
            self.has_plain_head = False
            logger.info(
                "%s computes all its logits: they are more than a projection (%s).", self.name, reason
            )
        own_attention = self.model.config._attn_implementation
        self.is_packed = True
        self.recurrent.passes_borders = bool(self.recurrent.mixers)
        if self.has_plain_head:
            reason = why_not(lambda: self._packed_logprobs(sequences, gradients))
        if reason is not None and self.recurrent.passes_borders:  # no kernels that keep sequences apart
            self.recurrent.passes_borders = False
            logger.debug("%s splits rows at the borders of sequences (%s).", self.name, reason)
            reason = why_not(lambda: self._packed_logprobs(sequences, gradients))
        if reason is None:
            reason = why_not(lambda: self._logprobs_of_tree(sequences, gradients))
            if reason is not None and self.recurrent.mixers:
                self.recurrent.hands_states_on = False
                logger.debug("%s runs recurrent layers over whole sequences (%s).", self.name, reason)
                reason = why_not(lambda: self._logprobs_of_tree(sequences, gradients))
            self.min_shared_tokens = MIN_SHARED_TOKENS if reason is None else None
            if reason is not None:
                logger.info("%s computes what sequences share for each of them (%s).", self.name, reason)
            return
        self.is_padded = True
        self.model.set_attn_implementation(own_attention)
        logger.debug("%s runs padded sequences: it cannot be packed (%s).", self.name, reason)
        cannot_share = reason
        reason = why_not(lambda: self._padded_logprobs(sequences, gradients))
        if reason is not None:
            self.is_packed = self.is_padded = False
            logger.info("%s runs one sequence at a time: it cannot be packed (%s).", self.name, reason)
        else:
            logger.info("%s computes what sequences share for each of them (%s).", self.name, cannot_share)
        warn_if_slow(self.name, self.device, self.is_padded, cannot_share)

    def _check_causal(self, sequence: TokenSequence, expected_S: Tensor) -> None:
        """Raises ModelError if a token's log-probability changes with a later token, as in prefix models."""
        changed_T = sequence.tokens_T.copy()
        changed_T[-1] = (changed_T[-1] + 1) % self.vocab_size
        changed = pack([replace(sequence, tokens_T=changed_T)], self.device, trained_only=False)
        before_S, after_S = expected_S[:-1], self.logprobs_of_whole_model(changed)[:-1]
        difference = ((after_S - before_S).abs() / before_S.abs()).max().item()
        if difference > (1e-3 if self.dtype == torch.float32 else 0.05):
            raise ModelError(
                f"{self.name} ({type(self.model).__name__}) attends to later tokens: log-probabilities move "
                f"by {difference:.1%} when a later token is changed. In training it would read the tokens "
                f"that it has to predict. Choose a causal language model."
            )

    def _logprobs_of_plain_head(self, alone: list[PackedBatch]) -> Tensor:
        """Returns the log-probabilities from blocks of logits, after setting how logits are scaled."""
        self._logit_scaling = LogitScaling()
        hidden_ND = self.hidden_of(alone[0].tokens_1N, alone[0].positions_1N, alone[0].attention)
        projection_SV = self.head().logits(hidden_ND.index_select(0, alone[0].scored_S))
        logits_SV = self._logits_of_whole_model(alone[0]).float()
        config = self.model.config.get_text_config()
        scaling = architecture.logit_scaling(config, projection_SV, logits_SV, self.dtype)
        if scaling is None:
            raise ValueError("its logits are no multiple of its projection")
        self._logit_scaling = scaling
        return torch.cat([self.logprobs(batch) for batch in alone])

    def _gradients_alone(self, alone: list[PackedBatch]) -> list[Tensor]:
        """Returns the gradients of the embeddings, one sequence at a time through the model's own logits.

        There are none without a backward pass, which sampling does not need, and none are computed for a
        sharded model, whose processes would have to agree on a failure.
        """
        if self.is_sharded:
            return []
        try:
            return [self._gradient(batch) for batch in alone]
        except _FAILURES as error:
            logger.warning(
                "%s cannot be trained here: its backward pass fails in a trial (%s: %s).",
                self.name,
                type(error).__name__,
                error,
            )
            return []

    def _gradient(self, batch: PackedBatch) -> Tensor:
        return backward_trial.gradient_of_embeddings(
            self.model.get_input_embeddings(),
            lambda: self.backpropagate(batch, lambda logprobs_C, part: -logprobs_C.sum(), False),
        )

    def _check_backward(self, batch: PackedBatch, gradients: list[Tensor]) -> None:
        """Raises ValueError, after a warning, if the backward pass of sequences together fails, or has other
        gradients than one sequence at a time."""
        if not gradients:
            return
        reason = None
        try:
            found_ND = self._gradient(batch)
        except _FAILURES as error:
            reason = f"its backward pass fails: {type(error).__name__}: {error}"
        else:
            ranges = batch.layout.segments
            # What sequences share has the sum of their gradients, and in float16 each pass has its own scale.
            if batch.shared is None and self.dtype != torch.float16:
                found = torch.cat([found_ND[start:stop] for start, stop in ranges])
                difference = backward_trial.relative_difference(found, torch.cat(gradients))
                if difference > (1e-3 if self.dtype == torch.float32 else 0.1):
                    reason = f"its gradients would move by {difference:.2%}"
        if reason is not None:
            how = "as a padded batch" if self.is_padded else "in one row"
            logger.warning("%s falls back to a slower way: %s with sequences %s.", self.name, reason, how)
            raise ValueError(reason)

    def _packed_logprobs(self, sequences: list[TokenSequence], gradients: list[Tensor]) -> Tensor:
        """Returns the log-probabilities of `sequences` in one row. Raises ValueError if packing is unsafe."""
        self.model.set_attn_implementation(attention.NAME)
        batch = pack(sequences, self.device, trained_only=False)
        windows: list[int | None] = []
        found_S = self.logprobs(replace(batch, attention=replace(batch.attention, windows_seen=windows)))
        num_recurrent = self.recurrent.num_calls
        reason = architecture.why_not_packed(self.model.config.get_text_config(), windows, num_recurrent)
        if reason is not None:
            raise ValueError(reason)
        self._check_apart(batch)
        self._check_backward(batch, gradients)
        return found_S

    def _padded_logprobs(self, sequences: list[TokenSequence], gradients: list[Tensor]) -> Tensor:
        """Returns the log-probabilities of `sequences` as a batch. Raises ValueError if padding is unsafe."""
        batch = pack(sequences, self.device, trained_only=False, is_padded=True)
        found_S = self.logprobs(batch)
        self._check_apart(batch)
        self._check_backward(batch, gradients)
        return found_S

    def _check_apart(self, batch: PackedBatch) -> None:
        """Raises ValueError if the first sequence of a row changes others.

        A small leak could go unnoticed, so the first one is set to nan, which would spread.
        """
        (start, stop), *_ = batch.layout.segments

        def set_nan(module: nn.Module, inputs: Any, embeddings_BTD: Tensor) -> Tensor:
            with_nan_BTD = embeddings_BTD.clone()
            with_nan_BTD[0, start:stop] = torch.nan
            return with_nan_BTD

        hook = self.model.get_input_embeddings().register_forward_hook(set_nan)
        try:
            if self.logprobs(batch)[stop:].isnan().any():
                raise ValueError("information may leak from one sequence into another")
        finally:
            hook.remove()

    def _logprobs_of_tree(self, sequences: list[TokenSequence], gradients: list[Tensor]) -> Tensor:
        """Returns the log-probabilities of `sequences` in one row that has what they share once.

        Recurrent layers that run whole sequences learn in a first pass which projections they share, so the
        second one counts.
        """
        (family,) = families([sequence.tokens_T for sequence in sequences], min_shared=1)
        batch = pack([sequences[index] for index in family.indices], self.device, False, [family])
        for _ in range(2 if self.recurrent.runs_paths else 1):
            logprobs_P = self.logprobs(batch).cpu().numpy()
        self._check_backward(batch, gradients)
        found = dict(zip(family.indices, batch.layout.split(logprobs_P), strict=True))
        return torch.from_numpy(np.concatenate([found[0], found[1]])).to(self.device)

    # -- one micro-batch --------------------------------------------------------------------

    @property
    def packs_all_lengths(self) -> bool:
        """Whether any sequences can share a row, each seeing its own part of it."""
        return self.is_packed and not self.is_padded and not self.longrope_thresholds

    @torch.no_grad()
    def logprobs(self, batch: PackedBatch) -> Tensor:
        """Returns the log-probability of the target at every scored position: [P], fp32."""
        if not self.has_plain_head:
            return self.logprobs_of_whole_model(batch)
        hidden_ND = self.hidden_of(batch.tokens_1N, batch.positions_1N, batch.attention)
        hidden_SD = hidden_ND.index_select(0, batch.scored_S)
        logprobs_S = unembedding.score(self.head(batch.scored_S), hidden_SD, batch.targets_S)
        return logprobs_S if batch.shared is None else batch.shared.by_position(logprobs_S)

    @torch.no_grad()
    def scores(self, batch: PackedBatch) -> Scores:
        """Returns the log-probabilities, and whether each target is the argmax (see `Scores`)."""
        if not self.has_plain_head:
            logits_SV, targets_S1 = self._logits_of_whole_model(batch), batch.targets_S[:, None]
            others_SV = logits_SV.scatter(1, targets_S1, -torch.inf)
            is_argmax_S = logits_SV.gather(1, targets_S1)[:, 0] > others_SV.amax(1)
            return Scores(_log_probabilities(logits_SV, batch.targets_S), is_argmax_S)
        hidden_ND = self.hidden_of(batch.tokens_1N, batch.positions_1N, batch.attention)
        hidden_SD = hidden_ND.index_select(0, batch.scored_S)
        found = unembedding.score_and_compare(self.head(), hidden_SD, batch.targets_S)
        return found if batch.shared is None else Scores(*map(batch.shared.by_position, found))

    @torch.no_grad()
    def top_tokens(self, batch: PackedBatch, count: int) -> tuple[Tensor, Tensor]:
        """Returns the `count` most likely tokens at every scored position, and their log-probabilities.

        Both are [P, count], the most likely first. The batch must not share beginnings.
        """
        assert batch.shared is None
        if not self.has_plain_head:
            best, tokens = unembedding.top(self._logits_of_whole_model(batch).float().log_softmax(1), count)
            return tokens, best
        hidden_ND = self.hidden_of(batch.tokens_1N, batch.positions_1N, batch.attention)
        return unembedding.score_top(self.head(), hidden_ND.index_select(0, batch.scored_S), count)

    def backpropagate(
        self,
        batch: PackedBatch,
        token_loss: TokenLoss,
        checkpoint_layers: bool,
        prepare: Callable[[Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Adds the gradient of the trained positions' loss. Returns log-probabilities [P] and the loss.

        The batch must have a trained position. `unembedding.score_and_backpropagate` documents `token_loss`,
        which gets trained positions [P]. `prepare` is called before with the log-probabilities of all of
        them: for a loss that couples the tokens of a sequence, the projection is computed once more.
        """
        num_trained = batch.num_trained
        with torch.enable_grad(), checkpointed_layers(self.model, checkpoint_layers):
            if not self.has_plain_head:
                logprobs_S = self.logprobs_of_whole_model(batch)
                if prepare is not None:
                    prepare(logprobs_S[:num_trained].detach())
                loss = token_loss(logprobs_S[:num_trained], slice(0, num_trained))
                self._backward(loss, torch.ones_like(loss))
                return logprobs_S.detach(), loss.detach()
            hidden_ND = self.hidden_of(batch.tokens_1N, batch.positions_1N, batch.attention)
        # The gradient of the projection is computed outside of autograd.
        hidden_SD = hidden_ND.detach().index_select(0, batch.scored_S)
        head = self.head(batch.scored_S)
        if prepare is not None:
            trained = slice(num_trained)
            first_S = unembedding.score(head.at(trained), hidden_SD[trained], batch.targets_S[trained])
            shared = batch.shared
            prepare(
                first_S
                if shared is None
                else first_S.index_select(0, shared.place_P[: batch.layout.num_trained])
            )
        if batch.shared is not None:
            token_loss = batch.shared.loss_of(token_loss)
        trained_logprobs, loss, grad_SD = unembedding.score_and_backpropagate(
            head.at(slice(num_trained)), hidden_SD[:num_trained], batch.targets_S[:num_trained], token_loss
        )
        logprobs_S = trained_logprobs
        if len(hidden_SD) > num_trained:
            rest = head.at(slice(num_trained, None))
            others = unembedding.score(rest, hidden_SD[num_trained:], batch.targets_S[num_trained:])
            logprobs_S = torch.cat([trained_logprobs, others])
        if hidden_ND.requires_grad:
            trained_S = batch.scored_S[:num_trained]
            if batch.shared is None:
                grad_ND = torch.zeros_like(hidden_ND, dtype=grad_SD.dtype).index_copy_(0, trained_S, grad_SD)
            else:  # a hidden state may have several targets, whose terms are summed in fp32
                grad_ND = torch.zeros_like(hidden_ND, dtype=torch.float32)
                grad_ND = grad_ND.index_add_(0, trained_S, grad_SD.float()).to(grad_SD.dtype)
            self._backward(hidden_ND, grad_ND)
        return logprobs_S if batch.shared is None else batch.shared.by_position(logprobs_S), loss

    def _backward(self, output: Tensor, gradient: Tensor) -> None:
        """Runs the backward pass from `output`. In float16 gradients are scaled, unless they are sharded."""
        if self.dtype != torch.float16 or self.is_sharded:
            output.backward(gradient.to(output.dtype))
            return
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        loss_scaling.backpropagate(output, gradient.float(), trained)

    def dropping(self, keys_N: np.ndarray | None) -> contextlib.AbstractContextManager[None]:
        """Drops inputs of the active adapter in the body, by keys of the row's tokens. None drops none."""
        keys = None if keys_N is None else copy_to(self.device, keys_N)
        return self.adapters.dropout_keys.set_to(keys)

    def hidden_of(self, tokens_1N: Tensor, positions_1N: Tensor, layout: AttentionLayout) -> Tensor:
        """Returns the hidden states that are the input of the projection to the vocabulary: [N, D]."""
        is_row = self.is_packed and not self.is_padded
        assert is_row or self.is_padded or len(layout.segments) == 1
        packed = {"position_ids": positions_1N, "layout": layout} if is_row else {}
        decode = self.model.decode if self.is_sharded else self._decoder
        tokens_BT = tokens_1N.view(len(layout.segments), -1) if self.is_padded else tokens_1N
        out = decode(input_ids=tokens_BT, use_cache=False, **packed)
        hidden_BTD: Tensor = out.last_hidden_state
        return hidden_BTD.flatten(0, 1)

    def head(self, scored_S: Tensor | None = None) -> Head:
        """Returns the projection to the vocabulary, including the active adapter.

        `scored_S` are the positions to be scored, which dropout needs in training.
        """
        projection = projection_of(self.model.get_output_embeddings())
        lora, keys_N = projection.lora, self.adapters.dropout_keys.keys_N
        if lora is not None and keys_N is not None and scored_S is not None:
            lora = replace(lora, keys_S=keys_N[scored_S])
        return Head(
            projection.module.weight,
            self.block_sizes,
            projection.module.bias,
            lora,
            projection.rows,
            scale=self._logit_scaling.scale,
            softcap=self._logit_scaling.softcap,
        )

    def logprobs_of_whole_model(self, batch: PackedBatch) -> Tensor:
        """Returns the log-probabilities from the model's own logits, for padded sequences or a single one.

        This is for models whose logits are more than a projection of the hidden states.
        """
        return _log_probabilities(self._logits_of_whole_model(batch), batch.targets_S)

    def _logits_of_whole_model(self, batch: PackedBatch) -> Tensor:
        # Sequences are padded, or there is one alone.
        tokens_BT = batch.tokens_1N.view(len(batch.layout.segments), -1)
        logits_BTV = self.model(input_ids=tokens_BT, use_cache=False).logits
        return logits_BTV.flatten(0, 1).index_select(0, batch.scored_S)

    def weight_bytes(self) -> int:
        """Returns the bytes of the weights on the device, at most, if they are gathered from several."""
        if self.is_sharded:
            return fsdp.bytes_held(self.model)
        on_device = (weight for weight in self.model.parameters() if weight.device.type == self.device.type)
        return sum(weight.nbytes for weight in on_device)

    def forget_prompts(self) -> None:
        """Frees what samplers keep of prompts, whose memory a pass of training may need."""
        for tree in self.prompt_trees:
            tree.clear()

    def discard_pass(self) -> None:
        """Resets the shards after a pass that failed or whose backward part does not run."""
        if self.is_sharded:
            fsdp.reset(self.model)


def warn_if_slow(name: str, device: torch.device, is_padded: bool, reason: str) -> None:
    """Warns about a model on CUDA whose sequences do not share rows, for this reason."""
    if device.type != "cuda":
        return
    how = "in batches that are padded to the longest" if is_padded else "one at a time"
    logger.warning(
        "%s cannot be packed on %s (%s). Its sequences run %s, which is slower.", name, device, reason, how
    )


def _log_probabilities(logits_SV: Tensor, targets_S: Tensor) -> Tensor:
    """Returns the log-probabilities of one target [S], or of several [S, J], at each position."""
    if targets_S.ndim == 2:
        return logits_SV.float().log_softmax(1).gather(1, targets_S)
    return -nn.functional.cross_entropy(logits_SV.float(), targets_S, reduction="none")
