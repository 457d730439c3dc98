"""Reports versions, devices, extras, caches, the hub, and what would be slow and why.

    python -m recipes.doctor

Loads no model and changes nothing. Behind the report stands what to do about each thing that is slow or
missing. It prints no secret: of a login it says only that there is one.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path

from cookbook.config import cli
from cookbook.data.cache import cache_folder
from cookbook.engine.cards import GIB
from cookbook.engine.threads import VARIABLES, num_cores, num_threads
from cookbook.errors import ConfigError
from cookbook.utils import files, hub
from cookbook.utils.control_characters import visible
from cookbook.utils.extras import install_command
from cookbook.utils.rich_console import make_console, plain
from cookbook.utils.versions import installed_versions

PACKAGES = ("sft-cookbook", "torch", "transformers", "peft", "datasets", "numpy", "tokenizers", "safetensors")
DISTRIBUTION = "sft-cookbook"
SLOW_VARIABLES = {
    "CUDA_LAUNCH_BLOCKING": "the CPU waits for every kernel",
    "PYTHONTRACEMALLOC": "Python records every allocation",
    "TORCH_DISTRIBUTED_DEBUG": "processes check every collective",
}


@dataclass
class Report:
    """The facts by their titles, and what is slow or missing, with what to do."""

    facts: dict[str, list[str]] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        for title, facts in self.facts.items():
            yield f"{title}:"
            yield from (f"  {fact}" for fact in facts)
        yield "What would be slow or fail, and why:" if self.findings else "Nothing would be slow."
        yield from (f"  - {finding}" for finding in self.findings)


def examine() -> Report:
    """Returns the report on this machine. Imports torch; looks up the hub for at most five seconds."""
    report = Report()
    report.facts["Versions"] = [
        *(f"{name} {version}" for name, version in installed_versions(PACKAGES).items()),
        f"run by {sys.executable} on {platform.platform()}",
    ]
    _examine_cpu(report)
    _examine_devices(report)
    _examine_extras(report)
    _examine_folders(report)
    _examine_hub(report)
    for name, effect in SLOW_VARIABLES.items():
        if os.environ.get(name) not in (None, "", "0", "OFF"):
            report.findings.append(f"{name} is set: {effect}. Unset it.")
    return report


def _examine_cpu(report: Report) -> None:
    import torch

    from cookbook.engine.model.memory import total_memory

    cores, threads = num_cores(), num_threads()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    total = total_memory(torch.device("cpu"))
    free = _meminfo().get("MemAvailable")
    of_free = "" if free is None else f", {free / GIB:,.1f} GiB of it available"
    report.facts["CPU"] = [
        f"{cores} cores, {threads} threads of torch, load {load:.1f}",
        f"{total / GIB:,.1f} GiB of memory{of_free}",
    ]
    named = [name for name in VARIABLES if os.environ.get(name)]
    if load > cores and not named:
        report.findings.append(
            f"Other programs use the cores (load {load:.1f} on {cores}): a run takes few threads, and fewer "
            f"tokens a second."
        )
    if named and threads < cores and load < cores / 2:
        report.findings.append(
            f"{named[0]}={os.environ[named[0]]} leaves {cores - threads} idle cores unused. Unset it."
        )
    if free is not None and free < 0.1 * total:
        report.findings.append("Less than a tenth of the memory is available: a run may swap or be killed.")


def _meminfo() -> dict[str, int]:
    """Returns Linux's counts of memory in bytes; {} on other systems."""
    path = Path("/proc/meminfo")
    if not path.is_file():
        return {}
    lines = re.findall(r"(\w+):\s+(\d+) kB", path.read_text(encoding="utf-8"))
    return {name: int(number) * 1024 for name, number in lines}


def _examine_devices(report: Report) -> None:
    import torch

    facts = report.facts.setdefault("GPU", [])
    if not torch.cuda.is_available():
        facts.append("none that torch can use")
        if shutil.which("nvidia-smi") is not None:
            why = (
                "torch was built without CUDA: install a build with it"
                if torch.version.cuda is None
                else f"torch was built for CUDA {torch.version.cuda}: the driver may be too old"
            )
            report.findings.append(f"This machine has nvidia-smi, but torch sees no GPU: {why}.")
        else:
            report.findings.append(
                "There is no GPU: models above some hundred million weights take hours on a CPU. "
                "`python -m recipes.estimate` tells how long."
            )
        return
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        capability = (properties.major, properties.minor)
        facts.append(
            f"cuda:{number} {properties.name}, {total / GIB:,.1f} GiB ({free / GIB:,.1f} free), "
            f"capability {capability[0]}.{capability[1]}"
        )
        if capability < (8, 0):
            report.findings.append(
                f"cuda:{number} has no bfloat16 units (capability below 8.0): dtype=float16 is faster."
            )
        if free < 0.8 * total:
            report.findings.append(f"Another program holds memory of cuda:{number}: `nvidia-smi` names it.")
    for package in ("fla", "causal_conv1d"):
        if util.find_spec(package) is None:
            report.findings.append(
                f"{package} is not installed: recurrent layers (Qwen3.5, Mamba) run without their kernels. "
                + install_command("hybrid")
            )


def _examine_extras(report: Report) -> None:
    """Lists the extras, by whether the packages that they name are installed."""
    try:
        about = metadata.metadata(DISTRIBUTION)
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        report.findings.append(f"{DISTRIBUTION} is not installed: pip install --editable . in its folder.")
        return
    facts = report.facts.setdefault("Extras", [])
    for extra in about.get_all("Provides-Extra") or []:
        if extra in ("dev", "bench", "docs"):
            continue
        of_extra = [one for one in requirements if re.search(rf"extra == ['\"]{re.escape(extra)}['\"]", one)]
        named = [found[0] for one in of_extra if (found := re.match(r"[A-Za-z0-9_.-]+", one)) is not None]
        installed = installed_versions(named)
        missing = [name for name in named if name not in installed]
        state = "installed" if not missing else f"no {', '.join(missing)}: {install_command(extra)}"
        facts.append(f"{extra}: {state}")


def _examine_folders(report: Report) -> None:
    from huggingface_hub import constants

    facts = report.facts.setdefault("Folders", [])
    named = {"rendered data (COOKBOOK_CACHE)": cache_folder(), "hub (HF_HOME)": Path(constants.HF_HOME)}
    for what, folder in named.items():
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        disk = shutil.disk_usage(existing)
        facts.append(f"{what}: {folder}, {disk.free / GIB:,.1f} GiB free")
        try:
            files.check_writable(existing)
        except OSError as error:
            report.findings.append(
                f"{folder} cannot be written ({error.strerror}): what it would hold is made or downloaded "
                f"anew for every run."
            )
        if disk.free < 5 * GIB:
            report.findings.append(f"{folder} is on a disk with {disk.free / GIB:,.1f} GiB free.")


def _examine_hub(report: Report) -> None:
    from huggingface_hub import get_token

    reason = hub.why_unreachable()
    login = "logged in" if get_token() else "not logged in (`hf auth login`; needed for gated models only)"
    report.facts["Hub"] = ["reachable" if reason is None else f"not reachable: {reason}", login]
    if reason is not None:
        report.findings.append(
            f"No model or data set can be downloaded: {reason}. Give folders, or use cookbook/tiny-chat."
        )


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    with cli.exiting_on_errors():
        if set(arguments) & set(cli.HELP):
            print(visible((__doc__ or "").strip()))
            return
        if arguments:
            raise ConfigError(f"recipes.doctor takes no arguments, and got {arguments[0]!r}.")
        make_console().print(plain("\n".join(examine().lines())))


if __name__ == "__main__":
    main()
