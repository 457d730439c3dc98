"""MLflow's own client, with a store of files in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cookbook.errors import ConfigError
from cookbook.loggers import MLflowLogger
from cookbook.utils.tables import Table

CONFIG = {"_type": "a:B", "learning_rate": 1.0, "dataset_builder": {"_type": "c:D", "dataset": "x.jsonl"}}


def mlflow_client() -> Any:
    from mlflow.tracking import MlflowClient  # takes a second

    return MlflowClient()


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return tmp_path / "store"


def test_metrics_tables_and_the_config_are_read_back(tmp_path: Path) -> None:
    logger = MLflowLogger(tmp_path, "pirates", None, CONFIG)
    logger.log_table(0, "samples", Table(["prompt", "reply"], [["Hi", "Arr!"]]))
    logger.log(0, {"test/nll": 2.5})
    logger.log(1, {"test/nll": 1.25})
    logger.close()
    client = mlflow_client()
    experiment = client.get_experiment_by_name("pirates")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "test/nll")
    assert [(one.step, one.value) for one in history] == [(0, 2.5), (1, 1.25)]
    assert run.data.params == {"learning_rate": "1.0", "dataset_builder.dataset": "x.jsonl"}
    assert (run.info.run_name, run.info.status) == (tmp_path.name, "FINISHED")
    path = client.download_artifacts(run.info.run_id, "samples/000000.json", str(tmp_path))
    assert json.loads(Path(path).read_text(encoding="utf-8"))["data"] == [["Hi", "Arr!"]]


def test_a_resumed_run_continues_under_its_id(tmp_path: Path) -> None:
    MLflowLogger(tmp_path, "pirates", "mine", CONFIG).log(0, {"test/nll": 2.5})
    logger = MLflowLogger(tmp_path, "pirates", "mine", CONFIG)
    logger.log(1, {"test/nll": 1.0})
    logger.close()
    client = mlflow_client()
    experiment = client.get_experiment_by_name("pirates")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert len(client.get_metric_history(run.info.run_id, "test/nll")) == 2


def test_a_store_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://store")
    with pytest.raises(ConfigError, match="mlflow_experiment='pirates', but MLflow cannot start"):
        MLflowLogger(tmp_path, "pirates", None, CONFIG)
