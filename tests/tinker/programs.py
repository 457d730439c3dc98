"""The programs of tinker-cookbook that are run against this project, each as a person starts it.

A program is one or more command lines: a module of tinker-cookbook, or a script of `scripts/`, with its
arguments. The scripts import only `tinker` and `tinker_cookbook`. `{log}` is the program's own folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).parent / "scripts"
RECIPES = "tinker_cookbook.recipes"

NLL_KEYS = ("train_mean_nll", "train_mean_nll:mean", "nll", "dpo_loss", "loss")
"""The metrics that say what the first step computed, of which the first that a program logs counts."""


@dataclass(frozen=True)
class Program:
    name: str
    commands: tuple[tuple[str, ...], ...]
    """Run one after another. Each begins with a module, or with the name of a script."""
    resumes: bool = False
    """Whether the last command continues the first, as if the first had been stopped before its last step."""
    equals: str | None = None
    """Another program whose first step computes the same."""
    is_quick: bool = False
    """Whether `make test` runs it too, where the packages are installed."""

    @property
    def has_metrics(self) -> bool:
        return "log_path={log}" in self.commands[0]


def recipe(module: str, *arguments: str) -> tuple[str, ...]:
    return (f"{RECIPES}.{module}", "log_path={log}", "model_name=Qwen/Qwen3-8B", *arguments)


def script(name: str, *arguments: str) -> tuple[str, ...]:
    return (str(SCRIPTS / f"{name}.py"), "{log}", *arguments)


def sl_loop(*arguments: str) -> tuple[str, ...]:
    return recipe("sl_loop", "batch_size=8", "lora_rank=4", "max_length=512", "save_every=1", *arguments)


def sl_basic(*arguments: str) -> tuple[str, ...]:
    return recipe("sl_basic", "lora_rank=4", "max_steps=2", *arguments)


def chat_sl(*arguments: str) -> tuple[str, ...]:
    return recipe("chat_sl.train", "batch_size=8", "lora_rank=4", "max_length=512", *arguments)


def rl_loop(loss: str) -> Program:
    command = recipe(
        "rl_loop", "batch_size=2", "group_size=4", "lora_rank=4", "max_tokens=12", f"loss_fn={loss}"
    )
    return Program(f"rl_loop {loss}", (command,), is_quick=loss == "gspo")


def math_rl(name: str, *arguments: str, loss: str = "importance_sampling") -> Program:
    sizes = ("groups_per_batch=4", "group_size=4", "lora_rank=4", "max_tokens=5", "max_steps=2")
    steps = ("eval_every=0", "save_every=1", f"loss_fn={loss}")
    return Program(f"rl.train {name}", (recipe("math_rl.train", *sizes, *steps, *arguments),))


DPO = recipe("preference.dpo.train", "batch_size=4", "max_length=512", "max_steps=2")
ASYNC_LOSS = "stable_reinforce"

PROGRAMS = [
    Program("sl_loop", (sl_loop("max_steps=2"),), is_quick=True),
    Program(
        "sl_loop resume",
        (sl_loop("max_steps=2"), sl_loop("max_steps=3")),
        resumes=True,
        equals="sl_loop",
    ),
    Program("sl_basic", (sl_basic("eval_every=0"),)),
    Program("sl_basic evals", (sl_basic("eval_every=1", "infrequent_eval_every=1"),), equals="sl_basic"),
    Program("sl_basic trace", (sl_basic("enable_trace=True", "span_chart_every=1"),), equals="sl_basic"),
    Program(
        "sl_basic async saves", (sl_basic("async_periodic_saves=True", "save_every=1"),), equals="sl_basic"
    ),
    Program("sl_basic submit_ahead=2", (sl_basic("submit_ahead=2"),), equals="sl_basic"),
    Program("sl_basic submit_ahead=0", (sl_basic("submit_ahead=0"),), equals="sl_basic"),
    Program("sl_basic saves by tokens", (sl_basic("save_every_tokens=200"),), equals="sl_basic"),
    Program("chat_sl", (chat_sl("max_steps=2", "eval_every=1"),)),
    Program(
        "chat_sl resume",
        (
            chat_sl("max_steps=2", "save_every=1"),
            chat_sl("max_steps=3", "save_every=1", "behavior_if_log_dir_exists=resume"),
        ),
        resumes=True,
        equals="chat_sl",
    ),
    Program(
        "chat_sl rolling saves", (chat_sl("max_steps=3", "save_every=0", "rolling_save_every=1"),),
        equals="chat_sl",
    ),
    Program("chat_sl from a file", (chat_sl("max_steps=2", "dataset=chats.jsonl"),)),
    Program("chat_sl from a checkpoint", (script("from_checkpoint"),)),
    Program(
        "supervised streaming",
        (
            recipe(
                "distillation.off_policy_reasoning", "renderer_name=qwen3", "batch_size=4", "lora_rank=4",
                "max_length=512", "buffer_size=8", "max_prompts=16", "max_steps=2",
            ),
        ),
    ),
    Program("dpo", (DPO,)),
    Program("dpo evals", (script("dpo_evals"),)),
    *(rl_loop(loss) for loss in ("importance_sampling", "cispo", "gspo", "stable_reinforce")),
    Program("rl_basic", (recipe("rl_basic", "lora_rank=4", "max_tokens=12", "max_steps=1"),)),
    math_rl("sync"),
    math_rl("ppo", loss="ppo"),
    math_rl("dro", loss="dro"),
    math_rl("cispo", loss="cispo"),
    math_rl("stable_reinforce", loss="stable_reinforce"),
    math_rl("async", "max_steps_off_policy=1", loss="stable_reinforce"),
    math_rl(
        "stream_minibatch",
        "stream_minibatch_config.groups_per_batch=4",
        "stream_minibatch_config.num_minibatches=2",
    ),
    Program(
        "rl.train KL",
        (
            recipe(
                "rl_basic", "lora_rank=4", "max_tokens=12", "max_steps=1", "kl_penalty_coef=0.1",
                "kl_reference_config.base_model=Qwen/Qwen3-8B", "compute_post_kl=True",
            ),
        ),
    ),
    math_rl("substeps", "num_substeps=2"),
    math_rl("evals", "eval_every=1"),
    math_rl("loss_fn_config", 'loss_fn_config={"clip_low_threshold": 0.9}', loss="ppo"),
    Program(
        "preference.shorter",
        (
            recipe(
                "preference.shorter.train", "renderer_name=qwen3", "batch_size=2", "group_size=4",
                "max_tokens=8", "max_steps=2", "eval_every=0",
            ),
        ),
    ),
    Program(
        "on_policy_distillation",
        (
            recipe(
                "distillation.on_policy_distillation", "teacher_model=Qwen/Qwen3-4B-Instruct-2507",
                "group_size=2", "groups_per_batch=2", "lora_rank=4", "max_tokens=12", "max_steps=2",
                "eval_every=0", "save_every=1",
            ),
        ),
    ),
    Program("off_policy distillation", (script("off_policy"),)),
    Program(
        "sdft",
        (
            recipe(
                "sdft.train", "groups_per_batch=2", "lora_rank=4", "max_tokens=12", "max_steps=2", "topk=4",
                "eval_every=0", "max_context_length=1000",
            ),
        ),
    ),
    Program("decisions", (script("decisions"),)),
    Program("custom evaluators", (script("custom_evaluators"),)),
    Program("benchmark gsm8k", (script("benchmark"),)),
    Program("completers", (script("completers"),)),
    Program("weights", (script("weights"),)),
    Program("rest client and processes", (script("rest"),)),
]  # fmt: skip
