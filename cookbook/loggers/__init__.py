"""Loggers of a run's metrics: files, the terminal, and experiment trackers by their own clients."""

from cookbook.loggers.base import MetricLogger, Metrics
from cookbook.loggers.console import ConsoleLogger, logging_to
from cookbook.loggers.files import JsonlLogger
from cookbook.loggers.mlflow import MLflowLogger
from cookbook.loggers.swanlab import SwanLabLogger
from cookbook.loggers.tensorboard import TensorBoardLogger
from cookbook.loggers.trackio import TrackioLogger
from cookbook.loggers.wandb import WandbLogger, check_wandb_login
from cookbook.utils.rich_console import make_console

__all__ = [
    "ConsoleLogger",
    "JsonlLogger",
    "MLflowLogger",
    "MetricLogger",
    "Metrics",
    "SwanLabLogger",
    "TensorBoardLogger",
    "TrackioLogger",
    "WandbLogger",
    "check_wandb_login",
    "logging_to",
    "make_console",
]
