"""The runs of a sweep, side by side on Ray Tune."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cookbook import clusters
from cookbook.config_files import foreign_classes, to_json
from cookbook.errors import ClusterError
from cookbook.sweeps.plan import Config, Plan, PlannedRun
from cookbook.sweeps.run_process import Progress

GCS_PORT = 6379
START_ATTEMPTS = 4
NO_LIMIT = 10**9
"""Of steps: a run ends by itself."""
OnEnd = Callable[[PlannedRun, Progress], None]


def execute(plan: Plan, runs: Sequence[PlannedRun], over: Sequence[PlannedRun], on_end: OnEnd) -> bool:
    """Runs `runs` to their ends, and tells of each one as it ends. False where it was interrupted.

    Those that were `over` before are what early stopping measures the others by.

    Raises ClusterError for a cluster that cannot be reached, or has not the devices of one run.
    """
    with _connected(plan.config) as ray:
        resources = _resources_per_run(plan.config, ray.cluster_resources())
        return _tune(plan, runs, over if plan.config.asha else (), resources, on_end)


@contextlib.contextmanager
def _connected(config: Config) -> Iterator[Any]:
    ray = clusters.import_ray()
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    temporary = tempfile.mkdtemp(prefix="ray-")  # so that no other Ray on this machine is disturbed
    try:
        if config.address is None:
            _start_here(ray, include_dashboard=False, _temp_dir=temporary, **quiet)
        else:
            _join(ray, config.address, **quiet)
        yield ray
    finally:
        ray.shutdown()
        shutil.rmtree(temporary, ignore_errors=True)


def _join(ray: Any, address: str, **options: Any) -> None:
    clusters.check_reachable(address, GCS_PORT)
    try:
        ray.init(address=address, **options)
    except Exception as error:  # Ray raises many kinds for a cluster of another version or token
        raise ClusterError(f"address={address}: {str(error).strip().splitlines()[0]}") from error


def _start_here(ray: Any, **options: Any) -> None:
    """Starts a Ray on this machine. Ray gives it 30 seconds, which are few where all cores are busy."""
    for attempt in range(START_ATTEMPTS):
        try:
            ray.init(address="local", **options)
            return
        except Exception as error:  # Ray raises a bare one
            ray.shutdown()
            if attempt + 1 == START_ATTEMPTS:
                raise ClusterError(f"Ray cannot be started on this machine: {error}") from error


def _resources_per_run(config: Config, of_cluster: dict[str, float]) -> dict[str, float]:
    """Raises ClusterError for a run that no node could ever take: it would wait for ever."""
    num_gpus = of_cluster.get("GPU", 0)
    gpus = min(1, num_gpus) if config.gpus_per_run is None else config.gpus_per_run
    for name, asked, there in (
        ("gpus", gpus, num_gpus),
        ("cpus", config.cpus_per_run, of_cluster.get("CPU", 0)),
    ):
        if asked > there:
            raise ClusterError(
                f"{name}_per_run={asked:g}, and there are {there:g} {name.upper()[:-1]}s. Ask for fewer."
            )
    return {"cpu": config.cpus_per_run, "gpu": gpus}


def _tune(
    plan: Plan,
    runs: Sequence[PlannedRun],
    over: Sequence[PlannedRun],
    resources: dict[str, float],
    on_end: OnEnd,
) -> bool:
    from ray import tune

    from cookbook.sweeps.trainable import RunTrainable, TellOfEnds

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a run that fails is told of by `on_end`
    by_name = {run.name: run for run in runs}
    tasks = [
        {
            "name": run.name,
            "module": plan.recipe.module,
            "folder": str(run.folder),
            "named": [f"{key}={name}" for key, name in foreign_classes(to_json(run.config)).items()],
            "metric": plan.config.metric,
            "cwd": os.getcwd(),
            "is_over": run in over,
        }
        for run in (*over, *runs)
    ]

    ended: set[str] = set()

    def tell(name: str, progress: Progress) -> None:
        ended.add(name)
        if name in by_name:
            on_end(by_name[name], progress)

    with tempfile.TemporaryDirectory(prefix=".tune-", dir=plan.folder) as storage:
        tune.Tuner(
            tune.with_resources(RunTrainable, resources),
            param_space={"run": tune.grid_search(tasks)},
            tune_config=tune.TuneConfig(scheduler=_scheduler(plan), reuse_actors=True),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=str(Path(storage)),
                verbose=0,
                callbacks=[TellOfEnds(tell)],
            ),
        ).fit()
    return len(ended) == len(tasks)  # after Ctrl-C, Tune returns as if all were well


def _scheduler(plan: Plan) -> Any:
    if not plan.config.asha:
        return None
    from ray.tune.schedulers import ASHAScheduler

    return ASHAScheduler(
        time_attr="num_steps",
        metric="value",
        mode=plan.config.mode,
        grace_period=plan.config.asha_grace_steps,
        reduction_factor=plan.config.asha_reduction_factor,
        max_t=NO_LIMIT,
    )
