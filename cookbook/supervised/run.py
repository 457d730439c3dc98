"""A run in progress: the verbs of the training loop, and what they share."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from cookbook import config_files
from cookbook.checkpoints import Checkpoint, CheckpointLog
from cookbook.errors import TrainingError
from cookbook.eval.evaluators import Evaluator, evaluate
from cookbook.futures import APIFuture
from cookbook.loggers import ConsoleLogger, JsonlLogger, MetricLogger, WandbLogger, log_to, make_console
from cookbook.schedules import learning_rate_at
from cookbook.supervised.batches import Batch, BatchQueue
from cookbook.supervised.nll_evaluator import NLLEvaluator
from cookbook.supervised.run_folder import RunFolder
from cookbook.supervised.types import SupervisedDataset
from cookbook.types import AdamParams, ForwardBackwardOutput, OptimStepResponse, SaveWeightsResponse

if TYPE_CHECKING:
    from cookbook.supervised.train import Config
    from cookbook.training_client import TrainingClient

logger = logging.getLogger(__name__)

FINAL = "final"


@dataclass(frozen=True)
class RunSummary:
    """What a run came to. `metrics` are those of the last evaluation."""

    log_path: Path
    is_finished: bool
    num_steps: int
    checkpoint_path: str | None
    metrics: dict[str, float] = field(default_factory=dict)
    stopped_by: int | None = None
    """The number of the signal that stopped the run."""


@dataclass(frozen=True)
class _Step:
    """A step that was queued, and what is known of it so far."""

    step: int
    batch: Batch
    seconds_waited_for_batch: float
    learning_rate: float
    eval_metrics: dict[str, float]
    forward_backward: APIFuture[ForwardBackwardOutput] | None
    optim_step: APIFuture[OptimStepResponse] | None
    save: APIFuture[SaveWeightsResponse] | None


class Run:
    """The verbs of the loop, and what they share."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        num_batches: int,
        checkpoints: CheckpointLog,
    ) -> None:
        self._config = config
        self._folder = folder
        self._num_batches = num_batches
        self._checkpoints = checkpoints
        self._total_steps = min(config.num_epochs * num_batches, config.max_steps or 2**63)
        last = checkpoints.last()
        self._first_step = last.step if last else 0
        self._step = self._first_step  # steps submitted so far
        self._pending: deque[_Step] = deque()
        self._eval_metrics: dict[str, float] = {}
        self._last_done = time.perf_counter()
        self._recent_seconds: deque[float] = deque(maxlen=20)
        self._client: TrainingClient
        self._batches: BatchQueue
        self._loggers: list[MetricLogger] = []
        self._evaluators: list[tuple[int, list[Evaluator]]] = []

    @classmethod
    async def open(cls, config: Config, stack: ExitStack) -> Run:
        """Everything before the first step. What can be refused is refused before a model is loaded."""
        console = make_console()
        resolved = config_files.to_json(config)
        train_data, eval_data = config.dataset_builder()
        folder = stack.enter_context(RunFolder(config.log_path, resolved, config.if_log_path_exists))
        for handler in log_to(console, folder.path / "train.log"):
            stack.callback(logging.getLogger("cookbook").removeHandler, handler)
        checkpoints = CheckpointLog(folder.path / "checkpoints.jsonl", config.keep_checkpoints)
        run = cls(config, folder, len(train_data), checkpoints)
        if run.is_finished:
            return run
        run._batches = stack.enter_context(
            BatchQueue(
                train_data, run._first_step, run._total_steps, config.seed, ahead=config.submit_ahead + 2
            )
        )
        await run._batches.check()
        run._evaluators = run._make_evaluators(eval_data)
        run._client = await run._create_client()
        run._loggers = [JsonlLogger(folder.path / "metrics.jsonl", run._first_step)]
        if config.wandb_project is not None:
            run._loggers.append(WandbLogger(folder.path, config.wandb_project, config.wandb_name, resolved))
        run._announce(train_data, eval_data)
        run._loggers.append(ConsoleLogger(console, run._total_steps, run._first_step))
        for metric_logger in run._loggers:
            stack.callback(metric_logger.close)
        run._last_done = time.perf_counter()
        return run

    @property
    def is_finished(self) -> bool:
        last = self._checkpoints.last()
        return last is not None and last.name == FINAL

    @property
    def remaining_steps(self) -> range:
        return range(self._first_step, self._total_steps)

    # -- the verbs of the loop --------------------------------------------------------------

    async def evaluate_if_due(self, step: int) -> None:
        """Evaluates the model as it is after `step` steps."""
        due = [
            evaluator
            for every, evaluators in self._evaluators
            if every and (step % every == 0 or step == self._total_steps)
            for evaluator in evaluators
        ]
        self._eval_metrics = {}
        if due:
            logger.info("After %d steps:", step)
            self._eval_metrics = await evaluate(self._client, due)

    async def submit(self, step: int) -> None:
        """Queues a step and, when it is due, the checkpoint of the state it leaves."""
        config = self._config
        batch, seconds_waited = await self._batches.next()
        learning_rate = learning_rate_at(
            step, self._total_steps, config.learning_rate, config.lr_schedule, config.warmup_steps
        )
        forward_backward = optim_step = save = None
        if batch.num_trained_tokens:
            forward_backward = self._client.forward_backward(batch.data, return_logprobs="trained")
            optim_step = self._client.optim_step(self._adam_params(learning_rate))
        else:
            logger.warning("Step %d is left out: no example of its batch kept a trained token.", step)
        self._step = step + 1
        if config.save_every and self._step % config.save_every == 0 and self._step < self._total_steps:
            save = self._client.save_state(_checkpoint_name(self._step), overwrite=True)
        self._pending.append(
            _Step(
                step,
                batch,
                seconds_waited,
                learning_rate,
                self._eval_metrics,
                forward_backward,
                optim_step,
                save,
            )
        )

    async def log_all_but(self, num_steps: int) -> None:
        """Waits for the oldest steps until only `num_steps` are pending, and logs them."""
        while len(self._pending) > num_steps:
            await self._log(self._pending.popleft())

    async def save_and_stop(self, signal_number: int) -> RunSummary:
        checkpoint = self._checkpoints.last()
        if checkpoint is None or checkpoint.step != self._step:
            name = _checkpoint_name(self._step)
            checkpoint = self._record(await self._client.save_state(name, overwrite=True), name, self._step)
        logger.info(
            "Stopped after step %d of %d. Saved %s. Run the same command again to resume.",
            self._step,
            self._total_steps,
            checkpoint.path,
        )
        return RunSummary(self._folder.path, False, self._step, checkpoint.path, {}, signal_number)

    async def evaluate_and_finish(self) -> RunSummary:
        await self.evaluate_if_due(self._total_steps)
        self._log_metrics(self._total_steps, self._eval_metrics)
        saved = await self._client.save_state(FINAL, overwrite=True)
        checkpoint = self._record(saved, FINAL, self._total_steps)
        logger.info("Finished after %d steps. Saved %s.", self._total_steps, checkpoint.path)
        return RunSummary(self._folder.path, True, self._total_steps, checkpoint.path, self._eval_metrics)

    def report_as_finished(self) -> RunSummary:
        last = self._checkpoints.last()
        assert last is not None
        logger.info(
            "This run is finished: %s. To run it again choose another log_path, or say if_log_path_exists=delete.",
            last.path,
        )
        return RunSummary(self._folder.path, True, last.step, last.path)

    # -- their parts ------------------------------------------------------------------------

    def _adam_params(self, learning_rate: float) -> AdamParams:
        config = self._config
        return AdamParams(
            learning_rate=learning_rate,
            beta1=config.adam_beta1,
            beta2=config.adam_beta2,
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            grad_clip_norm=config.grad_clip_norm,
        )

    async def _log(self, done: _Step) -> None:
        metrics: dict[str, float] = {"epoch": done.step // self._num_batches, **done.eval_metrics}
        if done.forward_backward is not None and done.optim_step is not None:
            output = await done.forward_backward
            grad_norm = (await done.optim_step).metrics["grad_norm"]
            if not (math.isfinite(output.loss) and math.isfinite(grad_norm)):
                raise TrainingError(
                    f"Training diverged at step {done.step}: train/nll is {output.loss}, the gradient norm "
                    f"{grad_norm}. Lower learning_rate={self._config.learning_rate} and run again from an earlier "
                    f"checkpoint (load_checkpoint_path=) or from the start."
                )
            metrics |= {"train/nll": output.loss, "optim/grad_norm": grad_norm}
        seconds = time.perf_counter() - self._last_done
        self._last_done += seconds
        self._recent_seconds.append(seconds)
        metrics |= {
            "optim/learning_rate": done.learning_rate,
            "data/sequences": len(done.batch.data),
            "data/tokens": done.batch.num_tokens,
            "data/trained_tokens": done.batch.num_trained_tokens,
            "perf/seconds": seconds,
            "perf/seconds_waited_for_batch": done.seconds_waited_for_batch,
            "perf/tokens_per_second": done.batch.num_tokens / seconds,
            "perf/seconds_left": median(self._recent_seconds) * (self._total_steps - done.step - 1),
        }
        self._log_metrics(done.step, metrics)
        if done.save is not None:
            self._record(await done.save, _checkpoint_name(done.step + 1), done.step + 1)

    def _log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        for metric_logger in self._loggers:
            metric_logger.log(step, metrics)

    def _record(self, saved: SaveWeightsResponse, name: str, step: int) -> Checkpoint:
        epoch, batch = divmod(step, self._num_batches)
        checkpoint = Checkpoint(name=name, path=saved.path, step=step, epoch=epoch, batch=batch)
        self._checkpoints.add(checkpoint)
        return checkpoint

    def _make_evaluators(self, eval_data: SupervisedDataset | None) -> list[tuple[int, list[Evaluator]]]:
        config = self._config
        frequent: list[Evaluator] = [] if eval_data is None else [NLLEvaluator(eval_data)]
        frequent += [build() for build in config.evaluator_builders]
        infrequent = [build() for build in config.infrequent_evaluator_builders]
        return [(config.eval_every, frequent), (config.infrequent_eval_every, infrequent)]

    async def _create_client(self) -> TrainingClient:
        from cookbook.engine.state import remove_unfinished
        from cookbook.service import ServiceClient

        config = self._config
        remove_unfinished(self._folder.checkpoint_dir)
        service = ServiceClient(config.device, config.dtype, checkpoint_dir=self._folder.checkpoint_dir)
        client = await service.create_lora_training_client_async(
            config.model_name,
            rank=config.lora_rank,
            seed=config.seed,
            train_mlp=config.train_mlp,
            train_attn=config.train_attn,
            train_unembed=config.train_unembed,
            user_metadata={"renderer_name": str(config.renderer_name)},
            alpha=config.lora_alpha,
        )
        last = self._checkpoints.last()
        if last is not None:
            await client.load_state_with_optimizer(last.path)
        elif config.load_checkpoint_path is not None:
            await client.load_state(config.load_checkpoint_path)
        return client

    def _announce(self, train_data: SupervisedDataset, eval_data: SupervisedDataset | None) -> None:
        info = self._client.get_info().model_data
        logger.info(
            "%s on %s in %s, LoRA rank %d. Training on %s, evaluating on %s. %d steps%s. %s",
            self._config.model_name,
            info.device,
            info.dtype,
            info.lora_rank,
            _size(train_data),
            "nothing" if eval_data is None else _size(eval_data),
            self._total_steps,
            f", resuming after {self._first_step}" if self._first_step else "",
            self._folder.path,
        )


def _size(dataset: SupervisedDataset) -> str:
    num_rows = dataset.summary().get("rows")
    return f"{len(dataset):,} batches" if num_rows is None else f"{num_rows:,} rows"


def _checkpoint_name(step: int) -> str:
    return f"{step:06d}"
