"""Chats with a fine-tuned model in the terminal.

    python -m recipes.chat checkpoint=runs/sft
    python -m recipes.chat checkpoint=runs/sft/checkpoints/000100 compare=True temperature=0
    python -m recipes.chat model_name=cookbook/tiny-chat system_prompt="You are brief."
    python -m recipes.chat server=http://127.0.0.1:8000/v1
    python -m recipes.chat checkpoint=runs/a against=runs/b web=True
    echo "What is the capital of Japan?" | python -m recipes.chat checkpoint=runs/sft

It uses the chat format and the system prompt recorded with the checkpoint. With compare=True the base model
also replies, from the same copy of the weights, and with against= a second checkpoint. Ctrl-C stops a reply,
Ctrl-D exits, /help lists the commands. With web=True a page of this machine shows the models side by side,
streams their replies and shows their tool calls; it loads nothing from elsewhere, and only this machine
reaches it. With piped input every line is a question, and only the replies are printed, without their
reasoning.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import chz

from cookbook import models
from cookbook.chat.remote import RemoteSession
from cookbook.chat.session import ChatSession
from cookbook.chat.terminal import BASE, Speaker, Terminal
from cookbook.config import cli
from cookbook.errors import ConfigError
from cookbook.runs.checkpoints import FOLDER
from cookbook.types import SamplingParams
from cookbook.utils import consoles
from cookbook.utils.control_characters import visible, visible_line
from cookbook.utils.network import LOOPBACK, check_can_listen
from renderers import get_renderer
from renderers.agreement import warning_of

if TYPE_CHECKING:
    from cookbook.clients.sampling import SamplingClient
    from cookbook.clients.service import ServiceClient

logger = logging.getLogger(__name__)


@chz.chz
class ChatConfig:
    """The model to chat with, and the sampling settings."""

    checkpoint: str | None = chz.field(default=None, doc="folder of a run, or of one of its checkpoints")
    which: Literal["best", "last"] | None = chz.field(
        default=None, doc="of a run's checkpoints: best or last; default: the best, where one is recorded"
    )
    model_name: str | None = chz.field(
        default=None, doc="base model to chat with, or that of the checkpoint if it has moved"
    )
    compare: bool = chz.field(
        default=False, doc="show the base model's answers beside those of the fine-tuned one"
    )
    renderer_name: str | None = chz.field(
        default=None, doc="chat format; default: the checkpoint's, or chosen from the model"
    )
    system_prompt: str | None = chz.field(
        default=None, doc='put before the conversation; default: the checkpoint\'s; "": none'
    )
    template_kwargs: Mapping[str, Any] | None = chz.field(
        default=None,
        doc='variables of the chat template, such as {"enable_thinking": false}; default: the checkpoint\'s',
    )
    server: str | None = chz.field(
        default=None,
        doc="a server with OpenAI's API, such as http://127.0.0.1:8000/v1; model_name= is its name there",
    )
    against: str | None = chz.field(
        default=None, doc="a second checkpoint of the same model, which replies beside the first"
    )
    web: bool = chz.field(default=False, doc="chat in the browser, on a page of this machine")
    port: int = chz.field(default=0, doc="port of that page; 0: any that is free")
    temperature: float = chz.field(default=0.7, doc="0: greedy")
    top_p: float = chz.field(
        default=1.0, doc="nucleus: draw from the most likely tokens with this total probability"
    )
    max_tokens: int = chz.field(default=1024, doc="maximum number of tokens of a reply")
    seed: int | None = chz.field(default=None, doc="seed of the sampler, for the same replies every time")
    device: str = chz.field(default="auto", doc="auto (CUDA when there is one), cpu, cuda or cuda:N")
    dtype: str = chz.field(default="auto", doc="of the base model: auto or a name")

    @chz.validate
    def _check(self) -> None:
        if self.server is not None:
            if self.checkpoint or self.against or self.compare or self.web:
                raise ConfigError(
                    "server= chats with a model of a server, and checkpoint=, against=, compare= and web= "
                    "are of models of this process. Give model_name=, the name that the server has for it."
                )
        elif self.checkpoint is None and self.model_name is None:
            raise ConfigError(
                "There is no model to chat with. Give checkpoint= (a run's folder, such as runs/sft) or "
                "model_name="
            )
        if self.compare and self.checkpoint is None:
            raise ConfigError("compare=True compares a checkpoint with its base model. Give checkpoint= too.")
        if self.against is not None and self.checkpoint is None:
            raise ConfigError("against= is a second checkpoint. Give checkpoint= too.")
        if not self.temperature >= 0 or not 0 < self.top_p <= 1 or self.max_tokens < 1:
            raise ConfigError(
                f"temperature={self.temperature}, top_p={self.top_p}, max_tokens={self.max_tokens} cannot be "
                f"sampled with. Use temperature >= 0, 0 < top_p <= 1 and max_tokens >= 1."
            )


async def run(config: ChatConfig) -> None:
    from cookbook.clients.service import ServiceClient
    from cookbook.engine.options import EngineOptions

    consoles.keep_undecodable_input()
    if config.server is not None:
        with _ctrl_c_raises():
            session = RemoteSession(
                config.server, config.model_name, _sampling(config), config.system_prompt or None
            )
            speaker = Speaker("model", session)
            Terminal(sys.stdin, sys.stdout, sys.stderr).talk(f"{session.model} at {config.server}", [speaker])
        return
    if config.web:
        check_can_listen(LOOPBACK, config.port)
    options = EngineOptions(config.device, config.dtype, pack_weights=True)
    with _ctrl_c_raises(), closing(ServiceClient(options=options)) as service:
        if config.web:
            title, speakers, _ = _speakers(config, service)
            _serve_page(title, speakers, config.port)
            return
        with _loading_line(config):
            title, speakers, make_base = _speakers(config, service)
        Terminal(sys.stdin, sys.stdout, sys.stderr).talk(title, speakers, make_base)


def _serve_page(title: str, speakers: Sequence[Speaker], port: int) -> None:
    """Serves the page until Ctrl-C."""
    from cookbook.chat.web import ChatServer

    sessions = {one.label: one.session for one in speakers if isinstance(one.session, ChatSession)}
    with ChatServer(title, sessions, port) as server:
        print(visible(f"Chat at {server.address} (Ctrl-C ends it)"), flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


@contextmanager
def _loading_line(config: ChatConfig) -> Iterator[None]:
    """Says on a terminal what is being loaded, and how long it took."""
    if not sys.stdin.isatty():
        yield
        return
    started = time.monotonic()
    print(visible_line(f"Loading {config.checkpoint or config.model_name} ..."), end=" ", flush=True)
    yield
    print(visible(f"{time.monotonic() - started:.1f} s"), flush=True)


def _clients(
    config: ChatConfig, service: ServiceClient
) -> tuple[str, str, Mapping[str, str], dict[str, SamplingClient]]:
    """Returns the base model, the title, the metadata with the chat format, and the clients by labels."""
    from cookbook.runs.find import find_trained_model

    if config.checkpoint is None:
        assert config.model_name is not None
        base_model = models.canonical_name(config.model_name)
        return base_model, config.model_name, {}, {"model": service.create_sampling_client(None, base_model)}
    source = find_trained_model(config.checkpoint, config.which, config.model_name)
    base_model = source.origin
    clients = {BASE: service.create_sampling_client(None, base_model)} if config.compare else {}
    title = f"{base_model}, as trained in {source.folder}"
    if config.against is None:
        clients["tuned"] = service.create_sampling_client(source.folder, base_model)
    else:
        other = find_trained_model(config.against, config.which, config.model_name)
        if other.origin != base_model:
            raise ConfigError(
                f"against={config.against} is of {other.origin}, and {config.checkpoint} of "
                f"{base_model}: the two need one chat format. Give checkpoints of one model."
            )
        labels = _labels(source.folder, other.folder)
        for label, folder in zip(labels, (source.folder, other.folder), strict=True):
            clients[label] = service.create_sampling_client(folder, base_model)
        title += f" and in {other.folder}"
    return base_model, title, source.info.user_metadata or {}, clients


def _labels(folder: str | Path, other: str | Path) -> tuple[str, str]:
    """Returns what differs in the paths of two checkpoints: their names, those of their runs, or both."""
    first, second = ([part for part in Path(each).parts if part != FOLDER] for each in (folder, other))
    while first and second and first[0] == second[0]:
        del first[0], second[0]
    while len(first) > 1 and len(second) > 1 and first[-1] == second[-1]:
        del first[-1], second[-1]
    if not first or not second:
        return "first", "second"
    labels = str(Path(*first)), str(Path(*second))
    return labels if BASE not in labels else ("first", "second")


def _speakers(
    config: ChatConfig, service: ServiceClient
) -> tuple[str, list[Speaker], Callable[[], Speaker] | None]:
    """Returns the title of the chat, the models that reply, and what adds the base model to a checkpoint."""
    from cookbook.runs.find import recorded_template_kwargs

    base_model, title, recorded, clients = _clients(config, service)
    renderer_name = (
        config.renderer_name or recorded.get("renderer_name") or models.recommended_renderer(base_model)
    )
    system_prompt = recorded.get("system_prompt") if config.system_prompt is None else config.system_prompt
    is_recorded = renderer_name == recorded.get("renderer_name")
    tools_in_system = is_recorded and recorded.get("tools_in_system") == "True"
    template_kwargs = config.template_kwargs
    if template_kwargs is None and is_recorded:
        template_kwargs = recorded_template_kwargs(recorded)
    params = _sampling(config)
    base_tokenizer = next(iter(clients.values())).get_tokenizer()
    if warning := warning_of(
        get_renderer(renderer_name, base_tokenizer), base_model, models.recommended_renderer(base_model)
    ):
        logger.warning("%s", warning)
    context_length = models.context_length(base_model) or 2**20

    def speaker_of(label: str, client: SamplingClient) -> Speaker:
        renderer = get_renderer(
            renderer_name, client.get_tokenizer(), system_prompt, tools_in_system, template_kwargs
        )
        if unread := renderer.unread_template_kwargs():
            logger.warning("The chat template reads no %s of template_kwargs.", ", ".join(unread))
        return Speaker(label, ChatSession(client, renderer, params, context_length))

    speakers = [speaker_of(label, client) for label, client in clients.items()]
    make_base = None
    if config.checkpoint is not None:

        def make_base() -> Speaker:
            return speaker_of(BASE, service.create_sampling_client(base_model=base_model))

    how = "greedy" if config.temperature == 0 else f"temperature {config.temperature:g}"
    if config.top_p < 1 and config.temperature:
        how += f", top_p {config.top_p:g}"
    return f"{title} ({renderer_name}), {how}", speakers, make_base


def _sampling(config: ChatConfig) -> SamplingParams:
    return SamplingParams(
        max_tokens=config.max_tokens, seed=config.seed, temperature=config.temperature, top_p=config.top_p
    )


@contextmanager
def _ctrl_c_raises() -> Iterator[None]:
    """Makes Ctrl-C raise KeyboardInterrupt; asyncio would cancel the program."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def main(argv: list[str] | None = None) -> None:
    cli.run(ChatConfig, run, {}, prog="recipes.chat", argv=argv)


if __name__ == "__main__":
    main()
