"""Writes a data set from the replies of a teacher behind an OpenAI-compatible server.

    python -m recipes.distill url=http://localhost:8000/v1 model=teacher dataset=prompts.jsonl
    python -m recipes.sft dataset=distilled.jsonl model_name=Qwen/Qwen3-0.6B log_path=runs/student

Prompts are rows with a `prompt`, or conversations of any format, whose last reply is not used. Each reply is
written when it arrives: run the same command again, and it asks only for the missing ones. The key is
read from OPENAI_API_KEY. Beside the data set stands its report, <to>.report.json.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import chz

from cookbook.config import cli
from cookbook.data import distill
from cookbook.data.distill import DistillReport, Teacher
from cookbook.errors import ConfigError, ModelError
from cookbook.utils import files
from cookbook.utils.control_characters import visible


@chz.chz(typecheck=True)
class DistillConfig:
    """The teacher, the prompts, and the data set to write."""

    url: str = chz.field(doc="the server's base address, such as http://localhost:8000/v1")
    model: str = chz.field(doc="name of the model there")
    dataset: str = chz.field(doc="the prompts: a file, a folder or a hub id, like dataset of recipes.sft")
    to: str = chz.field(default="distilled.jsonl", doc="the data set to write, or to continue")
    system_prompt: str | None = chz.field(default=None, doc="put before prompts that have none")
    limit: int | None = chz.field(default=None, doc="number of prompts, the first ones; default: all")
    num_samples: int = chz.field(default=1, doc="replies to each prompt")
    temperature: float | None = chz.field(default=None, doc="default: the server's")
    top_p: float | None = chz.field(default=None, doc="default: the server's")
    max_tokens: int | None = chz.field(default=None, doc="maximum of a reply; longer ones are not kept")
    concurrency: int = chz.field(default=8, doc="requests at a time")
    max_retries: int = chz.field(default=5, doc="attempts after a failed request, with growing waits")

    @chz.validate
    def _check(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"url={self.url} is not an address. Give one such as http://localhost:8000/v1")
        at_least = {"num_samples": 1, "concurrency": 1, "max_retries": 0, "limit": 1, "max_tokens": 1}
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"Invalid {name}={value}: must be >= {least}.")

    def teacher(self) -> Teacher:
        settings = {name: getattr(self, name) for name in ("temperature", "top_p", "max_tokens")}
        given = {name: value for name, value in settings.items() if value is not None}
        return Teacher(self.url, self.model, os.environ.get("OPENAI_API_KEY"), given, self.max_retries)


async def run(config: DistillConfig) -> DistillReport:
    prompts = distill.read_prompts(config.dataset, config.system_prompt, config.limit)
    to = Path(config.to).expanduser()

    def progress(report: DistillReport) -> None:
        done = report.kept + report.kept_before
        if done % 100 == 0:
            print(visible(f"{done:,} of {len(prompts) * config.num_samples:,} replies"), flush=True)

    try:
        report = await distill.distill(
            config.teacher(),
            prompts,
            to,
            num_samples=config.num_samples,
            concurrency=config.concurrency,
            on_reply=progress,
        )
    except* ModelError as errors:
        raise ModelError(f"{errors.exceptions[0]} Run the same command again to continue.") from None
    record: dict[str, Any] = {"model": config.model, **report.to_json()}
    files.write(Path(f"{to}.report.json"), json.dumps(record, indent=2) + "\n")
    print(visible("\n".join([f"{to}:", *report.lines()])))
    return report


def main(argv: list[str] | None = None) -> DistillReport:
    return cli.run(DistillConfig, run, {}, prog="recipes.distill", argv=argv)


if __name__ == "__main__":
    main()
