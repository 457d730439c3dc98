"""The command `sft-cookbook`, and `python -m recipes`: runs a recipe by its name.

sft-cookbook                                 # lists the recipes
sft-cookbook sft dataset=chats.jsonl         # the same as python -m recipes.sft dataset=chats.jsonl
sft-cookbook --version
eval "$(sft-cookbook completion bash)"       # or zsh; for fish: sft-cookbook completion fish | source
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from cookbook.config import cli
from cookbook.errors import ConfigError
from cookbook.utils.control_characters import visible, visible_line
from cookbook.utils.nearest import did_you_mean
from recipes import summaries

COMMAND = "sft-cookbook"
WORDS = "completion-words"
"""The command that the completion scripts run: it prints what may follow the words before it."""

SCRIPTS = {
    "bash": f"""\
_sft_cookbook() {{
  local IFS=$'\\n' current="${{COMP_WORDS[COMP_CWORD]}}"
  [[ $current == "=" || ${{COMP_WORDS[COMP_CWORD-1]}} == "=" ]] && return
  COMPREPLY=($({COMMAND} {WORDS} "${{COMP_WORDS[@]:1:COMP_CWORD}}" 2>/dev/null))
  [[ ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace
}}
complete -o default -F _sft_cookbook {COMMAND}
""",
    "zsh": f"""\
#compdef {COMMAND}
_sft_cookbook() {{
  local -a found
  if [[ $words[CURRENT] == *=* ]]; then compset -P '*='; _files; return; fi
  found=("${{(@f)$({COMMAND} {WORDS} "${{(@)words[2,CURRENT]}}" 2>/dev/null)}}")
  compadd -S '' -- $found
}}
compdef _sft_cookbook {COMMAND}
""",
    "fish": f"""\
complete -c {COMMAND} -f -a '({COMMAND} {WORDS} (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null)'
""",
}


def main(argv: Sequence[str] | None = None) -> Any:
    """Runs the recipe that the first argument names, with the other arguments."""
    given = list(sys.argv[1:] if argv is None else argv)
    name, rest = (given[0], given[1:]) if given else ("", [])
    if name == WORDS:
        print(visible("\n".join(words(rest))))
        return None
    with cli.exiting_on_errors():
        if not name or name in cli.HELP:
            cli.print_help(overview())
            return None
        if name in ("--version", "-V", "version"):
            from cookbook import __version__

            cli.print_help(f"{COMMAND} {__version__}")
            return None
        if name == "completion":
            print(visible(_completion(rest)), end="")
            return None
        if name not in summaries():
            raise ConfigError(
                f"There is no command {visible_line(name)!r}.{did_you_mean(name, summaries())} "
                f"`{COMMAND}` without arguments lists them."
            )
        return importlib.import_module(f"recipes.{name}").main(rest)


def run() -> None:
    """Runs the command, as its entry point. A recipe ends with an exit code of its own, or with 0."""
    main()


def overview() -> str:
    """Returns the list of commands, in 80 columns."""
    lines = [f"{COMMAND} <command> [key=value ...], or python -m recipes.<command>", ""]
    for name, summary in summaries().items():
        line = f"  {name:<10} {summary}"
        lines += textwrap.wrap(line, 80, subsequent_indent=" " * 13, break_on_hyphens=False)
    lines += [
        "",
        f"{COMMAND} <command> --help lists the keys of a command.",
        f"{COMMAND} --version prints the version.",
        f"{COMMAND} completion bash|zsh|fish prints a script of completions:",
        f'  eval "$({COMMAND} completion bash)"',
    ]
    return "\n".join(lines)


def _completion(rest: Sequence[str]) -> str:
    if len(rest) != 1 or rest[0] not in SCRIPTS:
        given = " ".join(rest) or "nothing"
        raise ConfigError(
            f"completion: {visible_line(given)} is not a shell. Supported: {', '.join(SCRIPTS)}."
        )
    return SCRIPTS[rest[0]]


def words(before: Sequence[str]) -> list[str]:
    """Returns the commands, or the keys of a command, that begin with the last of these words."""
    *complete, begun = before or [""]
    if not complete:
        return [name for name in [*summaries(), "completion"] if name.startswith(begun)]
    if complete[0] == "completion":
        return [shell for shell in SCRIPTS if shell.startswith(begun)]
    if complete[0] not in summaries() or "=" in begun:
        return []
    keys = re.findall(r"^([\w.-]+)=", _help_of(complete[0]), re.MULTILINE)
    # A nested key may be given by its last part where that is unambiguous.
    last = [key.rsplit(".", 1)[-1] for key in keys]
    short = [part if last.count(part) == 1 else key for key, part in zip(keys, last, strict=True)]
    given = {word.partition("=")[0] for word in complete[1:]}
    return sorted(f"{key}=" for key in {"config", *short} - given if key.startswith(begun))


def _help_of(recipe: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        importlib.import_module(f"recipes.{recipe}").main(["--help"])
    return printed.getvalue()


if __name__ == "__main__":
    run()
