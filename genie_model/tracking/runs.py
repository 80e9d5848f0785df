"""One MLflow run per pipeline run, and below it one child per step.

    pipeline run "demo-1f0c3a"          params, held-out metrics, the registered model
    ├── collect                         each child: params, curves, pictures, data set digest,
    ├── train-tokenizer                 git commit, library versions
    └── ...

A study's run has one such run below it for each of its cells, tagged with study, variant, seed and preset.

A step that was killed and is run again carries on the same child, so its curves stay whole. Where Kubeflow makes the
runs itself (its MLflow plugin sets MLFLOW_RUN_ID in every pod), that run is adopted instead.
"""

from __future__ import annotations

import getpass
import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import psutil
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, Metric, Param, Run
from mlflow.exceptions import MlflowException
from numpy.typing import NDArray

from genie_model import checkpoint
from genie_model.config import Config
from genie_model.describe import sizes
from genie_model.preemption import Preempted
from genie_model.presets import get_preset
from genie_model.progress import RUNNER_VARIABLE
from genie_model.tracking.card import MADE

_FLUSH_SECONDS = 5.0
_BATCH = 1000  # MLflow's limit on metrics in one request
_PARAM_BATCH = 100  # and on params
_EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # MLflow's UI opens on runs and curves, not on LLM traces
    "mlflow.note.content": "A run is a pipeline run; its steps are nested below it. Pictures are artifacts of "
    "`evaluate`, curves in `train-tokenizer` and `train-world`.",
}
_CONTEXTS = {"train": "training", "eval": "evaluation", "": "training"}
_LIBRARIES = ("genie-platform", "torch", "numpy", "kfp", "mlflow-skinny", "procgen-mirror")  # those that are there


def connect(tracking_uri: str = "") -> MlflowClient:
    """A client of `tracking_uri`, or of MLFLOW_TRACKING_URI. Raises ValueError when none answers."""
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        raise ValueError(
            "no MLflow server named: set MLFLOW_TRACKING_URI or pass --tracking-uri (`make demo` starts one)"
        )
    if uri.startswith(("http://", "https://")):
        # MLflow's own client would retry for minutes before it says so.
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10).close()
        except urllib.error.HTTPError:
            pass  # it answers; what it allows is checked by the first real request
        except OSError as error:
            raise ValueError(f"no MLflow server answers at {uri} ({error}); start it, or name another one") from None
    return MlflowClient(tracking_uri=uri)


class StepRun:
    """A `progress.RunLog` that is one MLflow run; made by `step()`.

    Metrics are sent in batches, at most every five seconds, so that logging never holds up training.
    """

    def __init__(self, client: MlflowClient, config: Config, run_id: str, parent_id: str) -> None:
        self.client = client
        self.config = config
        self.run_id = run_id
        self.parent_id = parent_id
        self._waiting: list[Metric] = []
        self._lock = threading.RLock()  # of what waits: a step that stalls is told of by another thread
        self._flushed_at = time.monotonic()
        self._known_params = set(client.get_run(run_id).data.params)

    def params(self, values: Mapping[str, Any]) -> None:
        # A param cannot change in MLflow; a step that carries on has logged its own already.
        new = [Param(name, str(value)) for name, value in values.items() if name not in self._known_params]
        for start in range(0, len(new), _PARAM_BATCH):
            self.client.log_batch(self.run_id, params=new[start : start + _PARAM_BATCH])
        self._known_params |= set(values)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        now_ms = int(time.time() * 1000)
        with self._lock:
            self._waiting += [Metric(name, float(value), now_ms, step) for name, value in values.items()]
            if time.monotonic() - self._flushed_at >= _FLUSH_SECONDS:
                self.flush()

    def image(self, name: str, image_HWC: NDArray[np.uint8]) -> None:
        self.client.log_image(self.run_id, image_HWC, artifact_file=f"pictures/{name}.png")

    def dataset(self, uri: str, splits: Sequence[str] = ("train", "eval"), expected: str = "") -> str:
        """Records the digests of the stores at `uri`/train and `uri`/eval as this run's inputs, and the next run's.

        With no `splits`, of the one at `uri` itself, to train on. Returns a digest of them all. Raises ValueError where
        it is not the `expected` one.
        """
        from genie_model.data.store import VideoStore

        inputs, whole = [], hashlib.sha256()
        for split in splits or ("",):
            store, context = VideoStore.open(f"{uri}/{split}".rstrip("/")), _CONTEXTS[split]
            whole.update(store.digest.encode())
            dataset = Dataset(
                name=f"{uri.rstrip('/').rpartition('/')[2]}-{split}".rstrip("-"),
                digest=store.digest[:36],  # MLflow's limit
                source_type="uri",
                source=json.dumps({"uri": store.uri}),
                profile=json.dumps({"episodes": store.num_episodes, "frames": store.num_frames}),
            )
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
            for run_id in (self.run_id, self.parent_id):
                self.client.set_tag(run_id, f"dataset.{split or 'train'}.digest", store.digest)
                self.client.set_tag(run_id, f"dataset.{split or 'train'}.uri", store.uri)
        if expected not in ("", whole.hexdigest()):
            raise ValueError(f"the data set at {uri} has changed since it was collected: run the pipeline again")
        no_models: list[LoggedModelInput] = []
        self.client.log_inputs(self.run_id, inputs, no_models)
        return whole.hexdigest()

    def result(self, values: Mapping[str, float]) -> None:
        """What the whole pipeline run came to: metrics of the run above this step's."""
        now_ms = int(time.time() * 1000)
        self.client.log_batch(self.parent_id, [Metric(name, float(value), now_ms, 0) for name, value in values.items()])

    def made(self, what: str, uri: str) -> None:
        """Tells where a model lies, here and in the run above this step's, and there what its training came to."""
        for run_id in (self.run_id, self.parent_id):
            self.client.set_tag(run_id, f"{MADE}{what}", uri)
        self.result(checkpoint.load_training(uri))

    def flush(self) -> None:
        """Sends the metrics that wait."""
        with self._lock:
            while self._waiting:
                self.client.log_batch(self.run_id, metrics=self._waiting[:_BATCH])
                del self._waiting[:_BATCH]
            self._flushed_at = time.monotonic()


@contextmanager
def step(
    name: str,
    preset: str,
    overrides: Sequence[str] = (),
    *,
    root_uri: str,
    tracking_uri: str = "",
    experiment: str = "genie",
    study: Mapping[str, str] | None = None,
    pipeline: str = "coinrun",
    ends_pipeline: bool = False,
) -> Iterator[StepRun]:
    """A pipeline step: resolves its config, opens its run, and ends the run with what became of the step.

    `study` is {"name"} for a step of a study, and for one of its cells, as `studies.plan` made it, {"name", "run",
    "variant"}. Steps of another `pipeline` than coinrun have a run of their own, whatever else is equal.

    An error of the user's (ValueError, OSError, MLflow's) leaves one line on stderr; its traceback goes to the run as
    error.txt. It exits with 2 for what fails every time, a ValueError once the run is open, and else with 1. Ctrl-C and
    SIGTERM mark the run KILLED and exit with 130, or as training that saved itself says (`Preempted`).
    """
    run: StepRun | None = None
    _interrupt_on_sigterm()
    _end_with_runner()
    try:
        config = get_preset(preset).with_overrides(*overrides)
        run = _open(connect(tracking_uri), name, config, root_uri, experiment, {"pipeline": pipeline, **(study or {})})
        yield run
        run.flush()
        _end(run, "FINISHED", parent="FINISHED" if ends_pipeline else None)
    except (ValueError, OSError, MlflowException) as error:
        print(f"[{name}] error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        _end_anyhow(run, name, "FAILED", traceback.format_exc())
        raise SystemExit(2 if run and isinstance(error, ValueError) else 1) from None
    except (KeyboardInterrupt, Preempted) as stopped:
        print(f"[{name}] stopped; run it again to carry on", file=sys.stderr, flush=True)
        _end_anyhow(run, name, "KILLED")
        raise SystemExit(stopped.code if isinstance(stopped, Preempted) else 130) from None
    except BaseException:
        _end_anyhow(run, name, "FAILED", traceback.format_exc())
        raise


def _open(
    client: MlflowClient, name: str, config: Config, root_uri: str, experiment: str, study: Mapping[str, str]
) -> StepRun:
    if adopted := os.environ.get("MLFLOW_RUN_ID"):
        own = client.get_run(adopted)
        parent_id, run_id = own.data.tags.get("mlflow.parentRunId", adopted), adopted
        for key, value in _provenance(study).items():
            client.set_tag(run_id, key, value)
        if "name" in study and "variant" not in study:  # the pipeline's run is the study
            for key, value in {"genie.pipeline": parent_id, "preset": config.name, "study": study["name"]}.items():
                client.set_tag(parent_id, key, value)
            StepRun(client, config, parent_id, parent_id).params(config.flat())
        if "variant" in study:
            parent_id = _parent(client, own.info.experiment_id, config, root_uri, study)
            client.set_tag(run_id, "mlflow.parentRunId", parent_id)
            client.set_tag(run_id, "genie.step", name)
    else:
        found = client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found else client.create_experiment(experiment, tags=_EXPERIMENT_TAGS)
        parent_id = _parent(client, experiment_id, config, root_uri, study)
        run_id = _child(client, experiment_id, parent_id, name, study)
    for started in (parent_id, run_id):
        client.update_run(started, "RUNNING")
        if commit := _git_commit():  # one that is run again may be run by other code
            client.set_tag(started, "mlflow.source.git.commit", commit)
    run = StepRun(client, config, run_id, parent_id)
    run.params(config.flat())
    return run


def _parent(client: MlflowClient, experiment_id: str, config: Config, root_uri: str, study: Mapping[str, str]) -> str:
    """The run of this pipeline (same config, same root) that has not ended yet, else a new one.

    Of a study there is one for good, which more seeds are added to.
    """
    of_study, of_cell, pipeline = "name" in study, "variant" in study, study["pipeline"]
    whose = [study["run"] if of_cell else study["name"]] if of_study else [pipeline] * (pipeline != "coinrun")
    same = " ".join([config.digest(), root_uri, *whose])
    key = hashlib.sha256(same.encode()).hexdigest()[:16]
    still_open = "" if of_study and not of_cell else " and status != 'FINISHED'"
    if known := _latest(client, experiment_id, f"tags.`genie.pipeline` = '{key}'{still_open}"):
        return str(known.info.run_id)
    name = f"{'' if pipeline == 'coinrun' else f'{pipeline}-'}{config.name}-{config.digest()[:6]}"
    note = f"Run of pipeline {pipeline}, preset **{config.name}**, under `{root_uri}`. Its steps are the child runs."
    tags = {"genie.pipeline": key, "preset": config.name, **_provenance(study)}
    if of_study:
        name, note = f"{study['name']} at {config.name}", f"Its cells are the child runs, under `{root_uri}`."
        tags["study"] = study["name"]
    if of_cell:
        name, note = f"{study['variant']}, seed {config.seed}", f"A cell of **{study['name']}** under `{root_uri}`."
        tags |= {"variant": study["variant"], "seed": str(config.seed), "mlflow.parentRunId": study["run"]}
    parent = client.create_run(experiment_id, tags=tags | {"mlflow.note.content": note}, run_name=name)
    run = StepRun(client, config, parent.info.run_id, parent.info.run_id)
    run.params(config.flat())
    client.log_text(parent.info.run_id, config.to_json(), "config.json")
    if of_cell:
        run.result(sizes(config))
    return str(parent.info.run_id)


def _child(client: MlflowClient, experiment_id: str, parent_id: str, name: str, study: Mapping[str, str]) -> str:
    same = f"tags.`mlflow.parentRunId` = '{parent_id}' and tags.`genie.step` = '{name}'"
    if started := _latest(client, experiment_id, same):
        return str(started.info.run_id)
    tags = {"mlflow.parentRunId": parent_id, "genie.step": name, **_provenance(study)}
    return str(client.create_run(experiment_id, tags=tags, run_name=name).info.run_id)


def _latest(client: MlflowClient, experiment_id: str, filter_string: str) -> Run | None:
    runs = client.search_runs([experiment_id], filter_string, max_results=1, order_by=["attributes.start_time DESC"])
    return runs[0] if runs else None


def _provenance(study: Mapping[str, str]) -> dict[str, str]:
    """Where a run's code came from: git commit, library versions, machine."""
    tags = dict[str, str]()
    for library in _LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            tags[f"version.{library}"] = importlib.metadata.version(library)
    tags |= {"version.python": platform.python_version(), "mlflow.user": _user()}
    tags |= {
        "mlflow.source.name": f"pipelines/{study.get('name', study['pipeline'])}.py",
        "mlflow.source.type": "PROJECT",
    }
    if commit := _git_commit():
        tags["mlflow.source.git.commit"] = commit
    return tags


def _user() -> str:
    """Who runs this; a container's random user id has no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _git_commit() -> str:
    """GENIE_GIT_COMMIT (set in images), else the checkout's HEAD, else nothing."""
    if stamped := os.environ.get("GENIE_GIT_COMMIT"):
        return stamped
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _end(run: StepRun, status: str, parent: str | None) -> None:
    run.client.set_terminated(run.run_id, status)
    if parent and run.parent_id != run.run_id:
        run.client.set_terminated(run.parent_id, parent)


def _end_anyhow(run: StepRun | None, name: str, status: str, error_text: str = "") -> None:
    """Ends a run that did not succeed; the reason is already on the screen, so a dead server only adds a line."""
    if run is None:
        return
    try:
        run.flush()
        if error_text:
            run.client.log_text(run.run_id, error_text, "error.txt")
        _end(run, status, parent=status)
    except (OSError, MlflowException) as error:
        print(f"[{name}] MLflow could not be told: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def _interrupt_on_sigterm() -> None:
    """SIGTERM (a pod's end) becomes Ctrl-C; a second signal does not disturb the ending of the run."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)
        signal.signal(signal.SIGINT, interrupt)


def _end_with_runner() -> None:
    """Ends this process when the local runner was killed outright: two runs must not write one checkpoint."""
    runner = int(os.environ.get(RUNNER_VARIABLE, "0"))
    if not runner:
        return

    def watch() -> None:
        while psutil.pid_exists(runner):
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)  # not SIGTERM: training would first save
        time.sleep(20)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
