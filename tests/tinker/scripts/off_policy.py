"""Distils a teacher's most likely tokens as soft targets: off_policy.py LOG [TEACHER_PATH STEPS]."""

import asyncio
import sys

from tinker_cookbook.distillation import train_off_policy
from tinker_cookbook.distillation.datasets import TeacherConfig
from tinker_cookbook.recipes.chat_sl.chat_datasets import NoRobotsBuilder
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

TEACHER, PATH, STEPS = "Qwen/Qwen3-4B-Instruct-2507", None, 2
if len(sys.argv) > 2:
    TEACHER, PATH, STEPS = "Qwen/Qwen3-8B", sys.argv[2], int(sys.argv[3])
common = ChatDatasetBuilderCommonConfig(
    model_name_for_tokenizer="Qwen/Qwen3-8B", renderer_name="qwen3", max_length=512, batch_size=4
)
config = train_off_policy.Config(
    learning_rate=1e-3,
    dataset_configs=[
        train_off_policy.DatasetWithTeacher(
            dataset_builder=NoRobotsBuilder(common_config=common),
            teacher_config=TeacherConfig(base_model=TEACHER, load_checkpoint_path=PATH),
        )
    ],
    model_name="Qwen/Qwen3-8B",
    recipe_name="off_policy",
    renderer_name="qwen3",
    lora_rank=4,
    n_teacher_targets=5,
    batch_size=4,
    max_steps=STEPS,
    eval_every=0,
    save_every=1,
    log_path=sys.argv[1],
)
asyncio.run(train_off_policy.main(config))
