"""The model and the data this package ships, so that every recipe runs without a download.

`tiny-chat` is a small chat model which `cookbook.embedded.pretrain` makes from nothing. `pirate.jsonl` holds
conversations about the same little world in another dialect, written by `cookbook.embedded.chatter`.
"""

from pathlib import Path

MODEL_NAME = "cookbook/tiny-chat"
MODEL_PATH = Path(__file__).parent / "tiny-chat"
PIRATE_PATH = Path(__file__).parent / "pirate.jsonl"
LEARNING_RATE = 4e-3
"""A peak learning rate that suits fine-tuning the model with LoRA of rank 32, 8 conversations per step."""
