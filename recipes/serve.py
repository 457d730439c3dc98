"""Serves models to programs that use the Tinker SDK, and to clients of OpenAI's API.

    python -m recipes.serve
    python -m recipes.serve model_name=Qwen/Qwen3-0.6B port=8000

    TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-local python my_program.py

Only programs of this machine can reach it. For others, set the environment variable COOKBOOK_API_KEY to a key
that begins with tml-, and host=0.0.0.0. Ctrl-C stops it; checkpoints stay in its folder.
"""

from __future__ import annotations

from pathlib import Path

import chz

from cookbook import embedded
from cookbook.config import cli
from cookbook.server.options import DEFAULT_FOLDER, ServerOptions, api_key_of_environment, check_installed


@chz.chz
class ServeConfig:
    """The models to serve, the address, and the limits."""

    model_name: list[str] = chz.field(
        default_factory=lambda: [embedded.MODEL_NAME],
        doc="base models that clients may train and sample, separated by commas",
    )
    runs: list[str] = chz.field(
        default_factory=list,
        doc="folders of runs or checkpoints, or of several, to sample from by name over OpenAI's API",
    )
    host: str = chz.field(default="127.0.0.1", doc="address to listen at; others than loopback need a key")
    port: int = chz.field(default=8000, doc="port to listen at")
    folder: str = chz.field(default=str(DEFAULT_FOLDER), doc="folder of the checkpoints that clients save")
    max_adapters: int = chz.field(default=64, doc="models in training and samplers in memory at a time")
    max_request_mib: float = chz.field(default=64.0, doc="largest body of a request")
    session_timeout_seconds: float = chz.field(
        default=120.0, doc="a client that is silent for so long has ended, and what it has is freed"
    )
    device: str = chz.field(default="auto", doc="auto (CUDA when there is one), cpu, cuda or cuda:N")
    dtype: str = chz.field(default="auto", doc="of the base models: auto or a name")


async def run(config: ServeConfig) -> None:
    options = ServerOptions(
        models=config.model_name,
        runs=[Path(folder) for folder in config.runs],
        folder=Path(config.folder),
        host=config.host,
        port=config.port,
        api_key=api_key_of_environment(),
        max_request_mib=config.max_request_mib,
        session_timeout_seconds=config.session_timeout_seconds,
        max_adapters=config.max_adapters,
    )
    check_installed()
    from cookbook.server.serving import serve

    await serve(options, config.device, config.dtype)


def main(argv: list[str] | None = None) -> None:
    cli.run(ServeConfig, run, {}, prog="recipes.serve", argv=argv)


if __name__ == "__main__":
    main()
