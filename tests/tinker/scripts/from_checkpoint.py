"""Trains two steps from a checkpoint of another run: from_checkpoint.py LOG."""

import json
import sys
from pathlib import Path

from tinker_cookbook.recipes.chat_sl import train

log = Path(sys.argv[1])
common = {
    "model_name": "Qwen/Qwen3-8B", "batch_size": 8, "lora_rank": 4, "max_length": 512, "max_steps": 2,
    "behavior_if_log_dir_exists": "delete",
}  # fmt: skip
train.cli_main(train.CLIConfig(log_path=str(log / "first"), **common))
rows = [
    json.loads(line) for line in (log / "first/checkpoints.jsonl").read_text(encoding="utf-8").splitlines()
]
train.cli_main(
    train.CLIConfig(log_path=str(log / "second"), load_checkpoint_path=rows[-1]["state_path"], **common)
)
