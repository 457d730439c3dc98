"""Runs recipes as jobs, which wait for free devices and can be resumed.

    python -m recipes.jobs submit sft model_name=Qwen/Qwen3-0.6B dataset=chats.jsonl wait=True
    python -m recipes.jobs list
    python -m recipes.jobs logs sft-2a6019 follow=True
    python -m recipes.jobs cancel sft-2a6019
    python -m recipes.jobs retry sft-2a6019

Needs Ray: pip install 'sft-cookbook[ray]'. Without address= jobs go to a Ray head on this machine, which
`submit` starts and `stop-head` ends. See cookbook/jobs/README.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import NoReturn

import yaml
from rich.table import Table

from cookbook import jobs
from cookbook.config import cli
from cookbook.jobs import Job
from cookbook.utils import consoles
from cookbook.utils.control_characters import visible, visible_line
from cookbook.utils.rich_console import make_console, plain_line

PROG = "python -m recipes.jobs"


def main(argv: list[str] | None = None) -> None:
    """Exits with 0 if the command succeeded; `wait` and `--wait` only if the job succeeded."""
    consoles.replace_unprintable()
    arguments = parse(sys.argv[1:] if argv is None else argv)
    with cli.exiting_on_errors():
        try:
            code = COMMANDS[arguments.command](arguments)
        except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
            code = 0
    if code:
        sys.exit(code)


def _submit(arguments: argparse.Namespace) -> int:
    job = jobs.submit(
        arguments.recipe,
        arguments.keys,
        address=arguments.address,
        num_gpus=arguments.gpus,
        num_cpus=arguments.cpus,
    )
    return _report_submitted(job, arguments)


def _retry(arguments: argparse.Namespace) -> int:
    return _report_submitted(jobs.retry(arguments.id, address=arguments.address), arguments)


def _report_submitted(job: Job, arguments: argparse.Namespace) -> int:
    print(visible_line(f"Job {job.id}, in {job.log_path}."))
    if arguments.wait:
        return _follow_to_its_end(job.id, arguments)
    print(visible_line(f"{PROG} logs {job.id} --follow"))
    return 0


def _wait(arguments: argparse.Namespace) -> int:
    return _report_ended(jobs.wait(arguments.id, address=arguments.address))


def _follow_to_its_end(job_id: str, arguments: argparse.Namespace) -> int:
    for piece in jobs.logs(job_id, follow=True, address=arguments.address):
        print(visible(piece), end="", flush=True)
    return _report_ended(jobs.wait(job_id, address=arguments.address))


def _report_ended(job: Job) -> int:
    print(visible(f"Job {job.id}: {job.status}. {job.message}".strip()))
    return 0 if job.has_succeeded else 1


def _list(arguments: argparse.Namespace) -> int:
    found = jobs.list(address=arguments.address)
    if not found:
        print("No jobs.")
        return 0
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("job", "status", "submitted", "folder"):
        table.add_column(plain_line(name), overflow="fold", no_wrap=name != "folder")
    for job in found:
        table.add_row(*map(plain_line, (job.id, job.status, _time(job.submitted), job.log_path)))
    make_console().print(table)
    return 0


def _get(arguments: argparse.Namespace) -> int:
    job = jobs.get(arguments.id, address=arguments.address)
    print(visible(f"{job.id}: {job.status}. {job.message}".strip()))
    ended = "" if job.ended is None else f", ended {_time(job.ended)}"
    submitted = f"python -m {job.recipe}, submitted {_time(job.submitted)}{ended}"
    print(visible_line(f"{submitted}, with this config:"), end="\n\n")
    print(visible(yaml.safe_dump(job.config, sort_keys=False, allow_unicode=True)), end="")
    return 0


def _logs(arguments: argparse.Namespace) -> int:
    for piece in jobs.logs(arguments.id, follow=arguments.follow, address=arguments.address):
        print(visible(piece), end="", flush=True)
    return 0


def _cancel(arguments: argparse.Namespace) -> int:
    job = jobs.get(arguments.id, address=arguments.address)
    if job.has_ended:
        print(visible_line(f"Job {job.id} had ended already: {job.status}."))
        return 0
    if job.status == "RUNNING":
        print("The job saves, then ends.", flush=True)
    job = jobs.cancel(arguments.id, address=arguments.address)
    if not job.has_ended:
        waits = "waits for devices. It will not run, and is STOPPED when its turn comes."
        print(visible_line(f"Job {job.id} {waits}"))
        return 0
    print(visible_line(f"Job {job.id}: {job.status}. `{PROG} retry {job.id}` continues it."))
    return 0


def _stop_head(arguments: argparse.Namespace) -> int:
    head = jobs.find_head()
    if head is None:
        print("No Ray head runs on this machine.")
    else:
        jobs.stop_head(head)
        print("The Ray head is stopped. Running jobs have saved; submit them again to resume.")
    return 0


COMMANDS = {
    "submit": _submit,
    "list": _list,
    "get": _get,
    "wait": _wait,
    "logs": _logs,
    "cancel": _cancel,
    "retry": _retry,
    "stop-head": _stop_head,
}
HELP = {
    "submit": "run a recipe as a job: submit <recipe> key=value ...",
    "list": "all jobs, the newest first",
    "get": "a job, with the config that was pinned when it was submitted",
    "wait": "wait until a job has ended; exit code 0 only if it succeeded",
    "logs": "what a job printed",
    "cancel": "make a job save and end",
    "retry": "run a job that ended again, in the same folder: it resumes",
    "stop-head": "end the Ray head on this machine, after its jobs have saved",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(visible_line(message))


def parse(argv: list[str]) -> argparse.Namespace:
    """Returns the command and its settings. `key=value`, `--key=value` and `--key value` mean the same."""
    parser = _Parser(prog=PROG, description="Runs recipes as Ray jobs.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in HELP.items():
        command = commands.add_parser(
            name, help=text, description=text.capitalize() + ".", allow_abbrev=False
        )
        if name != "stop-head":
            command.add_argument(
                "--address", help="a Ray cluster's dashboard, host:port; default: this machine's"
            )
        if name == "submit":
            command.add_argument("recipe", help="a registered name, or a dotted module name")
            command.add_argument("keys", nargs="*", metavar="key=value", help="as the recipe takes them")
            command.add_argument(
                "--gpus", type=float, help="GPUs to queue for; default: 1 where there are any"
            )
            command.add_argument(
                "--cpus", type=float, help="CPU cores to queue for; default: 1, or all without GPUs"
            )
        elif name not in ("list", "stop-head"):
            command.add_argument("id", help="of the job, as `list` shows it")
        if name in ("submit", "retry"):
            command.add_argument(
                "--wait", action="store_true", help="show the log; exit 0 only if it succeeds"
            )
        if name == "logs":
            command.add_argument("--follow", action="store_true", help="until the job has ended")
    argv = [*argv[:1], *(one for argument in argv[1:] for one in _as_options(argument))]
    own, keys = _split_off_keys(argv) if argv[:1] == ["submit"] else (argv, [])
    arguments = parser.parse_args(own)
    if arguments.command == "submit":
        arguments.keys = keys
    return arguments


def _as_options(argument: str) -> list[str]:
    """Returns a `key=value` of the job itself as argparse reads it; other arguments as they are."""
    key, has_value, value = argument.removeprefix("--").partition("=")
    if not has_value:
        return [argument]
    if key in ("recipe", "id"):
        return [value]
    if key in ("address", "gpus", "cpus"):
        return [f"--{key}={value}"]
    if key in ("wait", "follow") and value in ("True", "true", "False", "false"):
        return [f"--{key}"] if value.lower() == "true" else []
    return [argument]


def _split_off_keys(argv: list[str]) -> tuple[list[str], list[str]]:
    """Returns the arguments of `submit` itself and those of its recipe (`key=value`, `--key value`)."""
    own, keys, rest = argv[:1], [], argv[1:]
    has_recipe = False
    while rest:
        argument = rest.pop(0)
        name, is_whole, _ = argument.partition("=")
        if name in ("--address", "--gpus", "--cpus"):
            own += [argument] if is_whole else [argument, *rest[:1]]
            del rest[: 0 if is_whole else 1]
        elif argument in ("--wait", "-h", "--help"):
            own.append(argument)
        elif not has_recipe and not is_whole and not argument.startswith("-"):
            own.append(argument)
            has_recipe = True
        else:
            keys.append(argument)
            if name.startswith("--") and not is_whole:
                keys += rest[:1]
                del rest[:1]
    return own, keys


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


if __name__ == "__main__":
    main()
