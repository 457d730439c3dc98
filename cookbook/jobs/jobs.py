"""Submits runs as jobs of a Ray cluster; lists, follows, cancels and retries them."""

from __future__ import annotations

import asyncio
import builtins
import json
import os
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chz

from cookbook.config import config_files
from cookbook.errors import ClusterError
from cookbook.jobs.connection import connect
from cookbook.jobs.head import START_SECONDS, RayHead, check_not_ended, end_head, find_head, start_head
from cookbook.supervised.notify import refuse
from cookbook.supervised.recipe import find_recipe
from cookbook.utils import files, json_files
from cookbook.utils.json_files import JsonOrigin
from cookbook.utils.nearest import did_you_mean

STOP_SECONDS = 24 * 3600
"""How long a cancelled job may take to save. Ray's default of 3 seconds is too short for most runs."""
POLL_SECONDS = 0.5
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Job:
    """A job of the cluster."""

    id: str
    status: str
    """PENDING (waits for devices), RUNNING, SUCCEEDED, FAILED or STOPPED (cancelled)."""
    recipe: str
    log_path: str
    config: dict[str, Any]
    """The resolved config at submission."""
    message: str
    submitted: float
    """Seconds since 1970, like `ended`."""
    ended: float | None

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    @property
    def has_succeeded(self) -> bool:
        return self.status == "SUCCEEDED"


def submit(
    recipe: str,
    argv: Sequence[str] = (),
    *,
    address: str | None = None,
    num_gpus: float | None = None,
    num_cpus: float | None = None,
) -> Job:
    """Submits `python -m <the recipe's module> <argv>`, with the config resolved now.

    `recipe` is a registered name or a dotted module name. Without an address the job goes to the Ray head on
    this machine, which is started if there is none. By default a job takes one GPU, or all cores of a machine
    where the cluster has no GPU, so that jobs queue. Raises ConfigError, before anything is submitted, for
    settings that the recipe would refuse.
    """
    found = find_recipe(recipe)
    config = found.make_config(argv)
    refuse(config.notify, "A job")
    config = chz.replace(config, log_path=str(Path(config.log_path).absolute()))
    return _submit(
        found.module, config_files.to_json(config), address or start_head().address, num_gpus, num_cpus
    )


def list_jobs(*, address: str | None = None) -> builtins.list[Job]:
    """Returns all jobs of the cluster, the newest first."""
    jobs = [_job(details) for details in _client(address).list_jobs() if details.submission_id]
    return sorted(jobs, key=lambda job: -job.submitted)


def get(job_id: str, *, address: str | None = None) -> Job:
    """Returns the job. Raises ClusterError for an unknown id, with the nearest known one."""
    jobs = {job.id: job for job in list_jobs(address=address)}
    if job_id in jobs:
        return jobs[job_id]
    hint = did_you_mean(job_id, jobs) or f" There are {len(jobs)} jobs: see `list`."
    raise ClusterError(f"There is no job {job_id!r}.{hint}")


def wait(job_id: str, *, address: str | None = None, timeout: float | None = None) -> Job:
    """Waits until a job has ended in any way. Raises TimeoutError after `timeout` seconds."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while not (job := get(job_id, address=address)).has_ended:
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError(f"Job {job_id} is still {job.status} after {timeout:g} seconds.")
        time.sleep(POLL_SECONDS)
    return job


def logs(job_id: str, *, follow: bool = False, address: str | None = None) -> Iterator[str]:
    """Yields the output of a job in pieces; with `follow` continues until the job ends."""
    job = get(job_id, address=address)
    client = _client(address)
    if not follow:
        yield client.get_job_logs(job_id)
        return
    while job.status == "PENDING":
        time.sleep(POLL_SECONDS)
        job = get(job_id, address=address)
    pieces = client.tail_job_logs(job_id)
    with asyncio.Runner() as runner:
        while True:
            try:
                yield runner.run(anext(pieces))
            except StopAsyncIteration:
                return


def cancel(job_id: str, *, address: str | None = None) -> Job:
    """Makes a job save and end, and waits for the end. Does nothing if the job has ended already.

    Does not wait for a pending job, which Ray stops instead of starting it.
    """
    job = get(job_id, address=address)
    if not job.has_ended:
        _client(address).stop_job(job_id)
    return job if job.status == "PENDING" else wait(job_id, address=address)


def retry(job_id: str, *, address: str | None = None) -> Job:
    """Submits a new job with the config and the folder of an ended one, so that it resumes.

    Raises ClusterError if the job has not ended.
    """
    job = get(job_id, address=address)
    if not job.has_ended:
        raise ClusterError(f"Job {job_id} is still {job.status}. Wait for it, or cancel it first.")
    details = _client(address).get_job_info(job_id)
    gpus, cpus = (_read_metadata(details, key, float | None) for key in ("num_gpus", "num_cpus"))
    config = job.config | {"if_log_path_exists": "resume"}
    return _submit(job.recipe, config, _address(address), gpus, cpus)


def stop_head(head: RayHead) -> None:
    """Ends the head and all its processes. Cancels unfinished jobs first, so that they save."""
    unfinished = [job for job in list_jobs(address=head.address) if not job.has_ended]
    for job in sorted(unfinished, key=lambda job: job.status == "RUNNING"):  # else pending jobs would start
        cancel(job.id, address=head.address)
    end_head(head)


def _submit(
    recipe_module: str,
    config: dict[str, Any],
    address: str,
    num_gpus: float | None,
    num_cpus: float | None,
) -> Job:
    client = connect(address)
    if num_gpus is None and num_cpus is None:
        num_gpus, num_cpus = _devices_per_job(address)
    job_id = f"{recipe_module.rsplit('.', 1)[-1]}-{secrets.token_hex(3)}"
    # The resolved config is a separate file in log_path, the one folder that the job must reach.
    file = files.make_folder(Path(config["log_path"]) / "jobs") / f"{job_id}.json"
    files.write(file, json.dumps(config, indent=2, ensure_ascii=False))
    named = [f"{key}={name}" for key, name in config_files.foreign_classes(config).items()]
    command = [_python(address), "-m", recipe_module, f"config={file}", *named]
    _submit_once(
        client.submit_job,
        address,
        # `exec` so that signals reach the run, `cd` so that relative paths of data files stay valid.
        entrypoint=f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(command)}",
        submission_id=job_id,
        runtime_env={"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}},
        metadata={
            "recipe": recipe_module,
            "config": json.dumps(config),
            "num_gpus": json.dumps(num_gpus),
            "num_cpus": json.dumps(num_cpus),
        },
        entrypoint_num_gpus=num_gpus,
        entrypoint_num_cpus=num_cpus,
    )
    return get(job_id, address=address)


def _submit_once(submit_job: Callable[..., Any], address: str, **asked: Any) -> None:
    """Submits a job. Retries where a cluster that has just started has no agent, or drops connections.

    A request whose answer was lost may have been accepted. Its id then exists, so no job is started twice.
    """
    deadline = time.monotonic() + START_SECONDS
    is_answer_lost = False
    while True:
        try:
            submit_job(**asked)
            return
        except (RuntimeError, OSError) as error:  # Ray has no narrower type; that of requests is an OSError
            if is_answer_lost and f"{asked['submission_id']} already exists" in str(error):
                return
            check_not_ended(address)
            is_answer_lost |= isinstance(error, OSError)
            is_temporary = isinstance(error, OSError) or "No available agent" in str(error)
            if not is_temporary or time.monotonic() > deadline:
                raise ClusterError(f"The Ray cluster rejected the job: {error}") from error
        time.sleep(POLL_SECONDS)


def _devices_per_job(address: str) -> tuple[float, float]:
    """Returns GPUs and CPU cores: one GPU if there is any, else all cores of the largest machine."""
    from ray.util.state import list_nodes

    totals = [node.resources_total for node in list_nodes(address=address)]
    if any(total.get("GPU", 0) for total in totals):
        return 1, 1
    return 0, max((total.get("CPU", 1) for total in totals), default=1)


def _python(address: str) -> str:
    """Returns this Python if the head on this machine runs the jobs, else the one on the path."""
    head = find_head()
    return sys.executable if head is not None and head.address == address else "python"


def _job(details: Any) -> Job:
    metadata = details.metadata or {}
    config = _read_metadata(details, "config", dict[str, Any]) if "config" in metadata else {}
    return Job(
        id=details.submission_id,
        status=str(getattr(details.status, "value", details.status)),
        recipe=metadata.get("recipe", ""),
        log_path=config.get("log_path") or "",
        config=config,
        message=details.message or "",
        submitted=details.start_time / 1000,
        ended=None if details.end_time is None else details.end_time / 1000,
    )


def _read_metadata(details: Any, key: str, kind: Any) -> Any:
    """Reads metadata that `_submit` recorded. It is checked, since anyone on the cluster can submit jobs."""
    repair = "Submit the run again instead."
    origin = JsonOrigin(f"The metadata of job {details.submission_id}", ClusterError, repair)
    text = (details.metadata or {}).get(key)
    if text is None:
        origin.refuse(f"it lacks {key}")
    values = {key: json_files.value_of(text, origin)}
    json_files.check(values, {key: kind}, origin)
    if key == "config":
        json_files.check(values[key], {"log_path": str | None}, origin)
    return values[key]


def _client(address: str | None) -> Any:
    return connect(_address(address))


def _address(address: str | None) -> str:
    """Returns `address` or that of the head here. Raises ClusterError if there is neither."""
    if address is not None:
        return address
    head = find_head()
    if head is None:
        raise ClusterError(
            "No Ray head runs on this machine, so there are no jobs. `submit` starts one; a cluster "
            "elsewhere is named by its address."
        )
    return head.address
