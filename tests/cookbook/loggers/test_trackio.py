"""trackio with its own client and store, in separate processes, since it looks up its folder only once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cookbook.utils import jsonl

LIFE = """
import json, os, sys
from pathlib import Path
from cookbook.loggers import JsonlLogger, TrackioLogger
from cookbook.utils.tables import Table

folder, first_step, last_step, is_killed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
file = JsonlLogger(folder, first_step)
config = {"_type": "a:B", "learning_rate": 1.0, "nested": {"_type": "c:D"}}
logger = TrackioLogger(folder, "pirates", None, config, first_step)
for step in range(first_step, last_step + 1):
    for each in (file, logger):
        each.log_table(step, "samples", Table(["prompt", "reply"], [["Hi", f"Arr {step}!"]]))
        each.log(step, {"train/nll": step / 4})
if is_killed == "killed":
    os._exit(9)  # before the client has sent what it was given
logger.close()
"""

READ = """
import json
from trackio.sqlite_storage import SQLiteStorage
runs = SQLiteStorage.get_runs("pirates")
print(json.dumps({run: SQLiteStorage.get_logs("pirates", run) for run in runs}, default=str))
"""


def python(program: str, store: Path, *arguments: object) -> str:
    env = {**os.environ, "TRACKIO_DIR": str(store), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 9), done.stderr
    return done.stdout


def logs_in(store: Path) -> dict[str, list[dict[str, Any]]]:
    logs: dict[str, list[dict[str, Any]]] = json.loads(python(READ, store).splitlines()[-1])
    return logs


@pytest.mark.slow
def test_a_killed_and_resumed_run_has_each_step_once_with_its_table(tmp_path: Path) -> None:
    store, folder = tmp_path / "store", tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    python(LIFE, store, folder, 0, 3, "killed")
    jsonl.append(
        folder / "metrics.jsonl", {"step": 4, "train/nll": 1.0}
    )  # a row that the client never received
    python(LIFE, store, folder, 5, 6, "closed")
    python(LIFE, store, folder, 6, 7, "closed")
    logs = logs_in(store)
    assert list(logs) == ["mine"]
    found = [(row["step"], row["train/nll"]) for row in logs["mine"]]
    assert found == [(step, step / 4) for step in range(8)]
    table = logs["mine"][2]["samples"]
    assert (table["_type"], table["_value"]) == ("trackio.table", [{"prompt": "Hi", "reply": "Arr 2!"}])


@pytest.mark.slow
def test_two_folders_of_the_same_name_are_two_runs(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent / "mine").mkdir(parents=True)
        python(LIFE, tmp_path / "store", tmp_path / parent / "mine", 0, 1, "closed")
    logs = logs_in(tmp_path / "store")
    assert len(logs) == 2
    assert all([row["step"] for row in rows] == [0, 1] for rows in logs.values())
