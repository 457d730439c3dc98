"""SwanLab's own client, offline, in a process of its own: it keeps one run for a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("swanlab", reason="swanlab 0.10 needs other versions than constraints.txt holds")

LIFE = """
import sys
from pathlib import Path
from cookbook.loggers import SwanLabLogger
from cookbook.utils.tables import Table

folder, first_step = Path(sys.argv[1]), int(sys.argv[2])
logger = SwanLabLogger(folder, "pirates", None, {"_type": "a:B", "learning_rate": 1.0})
logger.log_table(first_step, "samples", Table(["prompt", "reply"], [["Hi", "Arr!"]]))
logger.log(first_step, {"train/nll": 1234.5 + first_step})
logger.close()
"""


def life(folder: Path, first_step: int) -> None:
    env = {**os.environ, "SWANLAB_MODE": "offline", "HOME": str(folder)}
    command = [sys.executable, "-c", LIFE, str(folder), str(first_step)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout


def test_an_offline_run_is_written_into_its_folder_and_continues_under_its_id(tmp_path: Path) -> None:
    life(tmp_path, 0)
    name = (tmp_path / "swanlab_run_id.txt").read_text(encoding="utf-8")
    life(tmp_path, 1)
    assert (tmp_path / "swanlab_run_id.txt").read_text(encoding="utf-8") == name
    written = b"".join(path.read_bytes() for path in (tmp_path / "swanlab").rglob("*") if path.is_file())
    assert b"train/nll" in written
    assert name.encode() in written or any(name in str(path) for path in (tmp_path / "swanlab").rglob("*"))
