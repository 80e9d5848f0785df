"""Runs, curves and the model registry. This package is the only import of mlflow."""

import logging
import os

from mlflow.exceptions import MlflowException as TrackingError

from genie_model.tracking.promotion import Check, Decision, check_champion, decide, own_data, promote, rollback
from genie_model.tracking.registry import ModelVersion, champion, numbered, register, versions
from genie_model.tracking.runs import StepRun, connect, step
from genie_model.tracking.studies import Reported, newest_study, plan, record_report, report

__all__ = [
    "Check",
    "Decision",
    "ModelVersion",
    "Reported",
    "StepRun",
    "TrackingError",
    "champion",
    "check_champion",
    "connect",
    "decide",
    "newest_study",
    "numbered",
    "own_data",
    "plan",
    "promote",
    "record_report",
    "register",
    "report",
    "rollback",
    "step",
    "versions",
]

# A step's screen belongs to its own progress bar and summary.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
logging.getLogger("mlflow").setLevel(logging.WARNING)
