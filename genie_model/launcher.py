"""Trains a stage on several hosts of a cluster, as if it were trained here: starts the job, shows its log, ends it.

A pipeline's step is one pod, and a slice of several hosts wants one on each. So the step is this launcher: it creates a
JobSet (jobset.py), waits for it and returns the URI that the stage leaves. Killed and run again it finds the JobSet by
its name and goes on; stopped by SIGTERM or Ctrl-C it deletes it. It asks the API server now and then instead of
watching: nothing that breaks, times out or forgets (410 Gone) has to be taken up again but the log's stream.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn

from genie_model import files
from genie_model.backend.sharding import Mesh, check_xla
from genie_model.config import Config, StageConfig
from genie_model.enlarging import Enlarging
from genie_model.genie import Genie
from genie_model.jobset import (
    DIGEST_LABEL,
    RESTARTS_LABEL,
    RUN_ANNOTATION,
    RUN_VARIABLE,
    Job,
    job_set,
)
from genie_model.jobset_client import TAIL, JobSetClient, host
from genie_model.presets import get_preset

__all__ = ["Job", "JobError", "launch"]

STAGES = ("train-tokenizer", "train-world", "train-decoder")
# Where Kubeflow Pipelines makes the MLflow runs itself, it tells the step of its own by these; the leader adopts it.
_PASSED_ON = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_WORKSPACE")
_NEVER = "FailJobSetFailurePolicyAction"  # why a JobSet failed that a rule of jobset.py gives up at once
_LOOK_SECONDS = 60.0  # how long a log is shown at most before the job's state is looked at
_UNPLACED_SECONDS = 60.0  # before it is told why hosts are waited for
_ENDING_SECONDS = 20.0  # a pipeline's step has 30 to end when it is cancelled


class JobError(RuntimeError):
    """The job ended without a result. `exit_code` is that of the pod that failed first, where it is known."""

    def __init__(self, text: str, exit_code: int | None = None) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def launch(
    job: Job,
    stage: str,
    preset: str,
    overrides: Sequence[str] = (),
    *,
    root_uri: str,
    data_uri: str,
    tokenizer_uri: str = "",
    data_digest: str = "",
    tracking_uri: str = "",
    experiment: str = "genie",
    study: Mapping[str, str] | None = None,
    poll_seconds: float = 10.0,
) -> str:
    """Runs `python -m genie_model STAGE` on every host of the job's slice; returns the URI of what it trained.

    The job is named after what it trains: a second launcher that asks for the same, with the same settings, shares it.
    `data_digest` says what lies at `data_uri` now: what was made of other data is not taken for done. Where the
    pipeline's run is named ($GENIE_PIPELINE_RUN), its next try is told of a failure that would come again, no more.
    The MLflow run is opened by the first host and not here.

    Raises ValueError for what can never work, a running job with other settings among it; JobError when the job
    failed; TimeoutError when it took longer than `job.deadline_seconds`; OSError (PermissionError where the role does
    not allow it) when the cluster cannot be asked. SIGTERM exits with 143 and Ctrl-C with 130, the job deleted.
    """
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r} cannot be launched: allowed are {', '.join(STAGES)}")
    config, overrides = _on_slice(stage, preset, overrides, job.slice.chips)
    trains = hashlib.sha256(" ".join([root_uri, config.digest(), data_uri, data_digest, tokenizer_uri]).encode())
    name = f"{stage}-{trains.hexdigest()[:12]}"
    result_uri = f"{root_uri}/results/{name}"
    command = ["python", "-m", "genie_model", stage, preset, *(f"--set={override}" for override in overrides)]
    command += [f"--root={root_uri}", f"--data={data_uri}", f"--experiment={experiment}", f"--result={result_uri}"]
    command += [f"--tokenizer={tokenizer_uri}"] if tokenizer_uri else []
    command += [f"--tracking-uri={tracking_uri}"] if tracking_uri else []
    command += [f"--study={json.dumps(study)}"] if study else []
    passed_on = {key: os.environ[key] for key in _PASSED_ON if os.environ.get(key)}
    cluster, run = JobSetClient(job.namespace, name), os.environ.get(RUN_VARIABLE, "")
    with _ended_by_signals(cluster):
        new = _start(cluster, job_set(job, name, command, passed_on, run), result_uri, poll_seconds)
        _Follower(cluster, job, poll_seconds, new).follow()
    if not files.exists(result_uri):
        raise JobError(f"JobSet {name} ended well and left no result at {result_uri}: see the log of its first host")
    return files.read(result_uri).decode()


def _on_slice(stage: str, preset: str, overrides: Sequence[str], chips: int) -> tuple[Config, list[str]]:
    """The config that `chips` train, and its overrides, of which the user's have the last word.

    As many chips as divide the batch share it, and those that are left share the heads. Raises ValueError for what the
    hosts would refuse, before any is asked for.
    """
    asked = get_preset(preset).with_overrides(*overrides)
    fsdp = math.gcd(chips, _stage(asked, stage).batch_size)
    overrides = ["parallel.backend=xla", f"parallel.fsdp={fsdp}", f"parallel.tensor={chips // fsdp}", *overrides]
    config = get_preset(preset).with_overrides(*overrides)
    mesh = Mesh(*config.parallel.mesh(chips))
    if config.parallel.backend == "xla":
        with torch.device("meta"):
            trained = _trained(config, stage)
        try:
            check_xla(mesh, trained, _stage(config, stage))
        except ValueError as error:
            raise ValueError(f"{stage} of {preset} cannot be shared by {chips} chips: {error}") from None
    return config, overrides


def _stage(config: Config, stage: str) -> StageConfig:
    stages = (config.train_tokenizer, config.train_world, config.train_large_decoder)
    return stages[STAGES.index(stage)]


def _trained(config: Config, stage: str) -> nn.Module:
    genie = Genie(config)
    return {"train-tokenizer": genie.tokenizer, "train-world": genie}.get(stage) or Enlarging(config, genie.tokenizer)


def _start(cluster: JobSetClient, wanted: dict[str, Any], result_uri: str, poll_seconds: float) -> bool:
    """Creates the JobSet, unless one that does the same runs or is done; whether it did."""
    digest, run = wanted["metadata"]["labels"][DIGEST_LABEL], wanted["metadata"]["annotations"].get(RUN_ANNOTATION)
    while True:
        found = cluster.job_set()
        if found is None:
            files.remove_tree(result_uri)  # an earlier JobSet's is not this one's
            if cluster.create(wanted):
                cluster.say("JobSet created")
                return True
            continue  # another launcher was faster
        same = found["metadata"].get("labels", {}).get(DIGEST_LABEL) == digest
        ended = found.get("status", {}).get("terminalState")
        if "deletionTimestamp" in found["metadata"]:
            cluster.say("waits for the JobSet before it to go")
        elif ended == "Completed" and same and files.exists(result_uri):
            cluster.say("the JobSet is done already")
            return False
        elif ended == "Failed" and same and run and _failed_in(found) == run:
            cluster.say("the JobSet failed in this very run, and would again")
            return False
        elif ended:
            cluster.say(f"the JobSet before it is {ended.lower()}, and made anew")
            cluster.delete()
        elif same:
            cluster.say("goes on with the JobSet that was started before")
            return False
        else:
            raise ValueError(
                f"JobSet {cluster.name} in namespace {cluster.namespace} trains this already, with another image or "
                f"other settings: wait for it, or end it with `kubectl -n {cluster.namespace} delete jobset "
                f"{cluster.name}`; what it saved is kept"
            )
        time.sleep(poll_seconds)


def _failed_in(found: dict[str, Any]) -> str | None:
    """The pipeline's run in which a JobSet failed for good; nothing where another try may go better."""
    conditions = found["status"].get("conditions", [])
    never = any(each["type"] == "Failed" and each.get("reason") == _NEVER for each in conditions)
    return found["metadata"].get("annotations", {}).get(RUN_ANNOTATION) if never else None


@contextlib.contextmanager
def _ended_by_signals(cluster: JobSetClient) -> Iterator[None]:
    """SIGTERM and Ctrl-C end the job; a second one does not disturb that."""

    def end(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # others hear no signals
        before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except SystemExit:
        cluster.say("stopped: deletes the JobSet; run again it carries on from its last checkpoint")
        cluster.delete()
        until = time.monotonic() + _ENDING_SECONDS
        while cluster.job_set() is not None and time.monotonic() < until:
            time.sleep(0.5)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Follower:
    """Tells of a JobSet until it ends."""

    def __init__(self, cluster: JobSetClient, job: Job, poll_seconds: float, new: bool) -> None:
        self._cluster, self._job, self._poll_seconds = cluster, job, poll_seconds
        self._state, self._restarts, self._waits_since = "", 0, time.monotonic()
        self._leader = ""  # the pod whose log is shown
        self._seen, self._heard, self._new = "", 0.0, new  # to which of its times, when, and whether from its start
        self._last = deque[str](maxlen=TAIL)
        self._failed: dict[str, _End] = {}  # by pod

    def follow(self) -> None:
        """Raises JobError and TimeoutError as `launch` says."""
        while True:
            found = self._cluster.job_set()
            if found is None or "deletionTimestamp" in found["metadata"]:
                raise JobError(f"JobSet {self._cluster.name} was deleted by somebody: run this again to carry on")
            status, pods = found.get("status", {}), self._cluster.pods()
            self._tell(status, pods)
            shown = self._show_log(next((pod for pod in pods if host(pod) == 0), None))
            if status.get("terminalState") == "Completed":
                return
            if status.get("terminalState"):
                raise self._failure(status)
            made = datetime.fromisoformat(found["metadata"]["creationTimestamp"])
            if (datetime.now(UTC) - made).total_seconds() > self._job.deadline_seconds:
                self._cluster.delete()
                raise TimeoutError(
                    f"JobSet {self._cluster.name} took longer than its {self._job.deadline_seconds} s and was "
                    "deleted: what it saved is kept, give it more"
                )
            time.sleep(min(1.0, self._poll_seconds) if shown else self._poll_seconds)

    def _tell(self, status: dict[str, Any], pods: Sequence[Any]) -> None:
        """A line for each change."""
        ends = {pod.metadata.name: end for pod in pods if (end := _end(pod)) and pod.metadata.name not in self._failed}
        if ends:
            first, more = _first(ends), f"; {len(ends) - 1} more hosts ended too" if len(ends) > 1 else ""
            self._cluster.say(f"{first} {ends[first].why}{more}")
        self._failed |= ends
        if status.get("restarts", 0) > self._restarts:
            self._restarts, self._waits_since = status["restarts"], time.monotonic()
            counted = status.get("restartsCountTowardsMax", 0)
            self._cluster.say(
                f"starts again, for the {self._restarts}. time; {counted} of {self._job.max_restarts} failures count"
            )
        hosts = self._job.slice.hosts
        conditions = {each["type"]: each for each in status.get("conditions", []) if each["status"] == "True"}
        if "Suspended" in conditions:
            state = f"waits in the queue: {conditions['Suspended'].get('message', '')}"
        elif sum(pod.status.phase in ("Running", "Succeeded") for pod in pods) >= hosts:
            state = f"all {hosts} hosts run"
        else:
            state = f"waits for {hosts} hosts"
            if time.monotonic() - self._waits_since > _UNPLACED_SECONDS:
                state += next((f": {why}" for why in map(_waits_for, pods) if why), "")
        if state != self._state:
            self._cluster.say(state)
        self._state = state

    def _show_log(self, leader: Any) -> bool:
        """Of the first host, what is new: until it ends, is idle, or the state must be looked at. Whether it began."""
        if leader is None or leader.status.phase == "Pending":
            return False
        part = {"since_seconds": int(time.monotonic() - self._heard) + 10}  # too much: the times tell what is new
        if leader.metadata.name != self._leader:
            part = {} if self._new else {"tail_lines": TAIL}
            self._leader, self._seen, self._heard, self._new = leader.metadata.name, "", time.monotonic(), True
        until = time.monotonic() + _LOOK_SECONDS
        for line in self._cluster.log(self._leader, self._poll_seconds, **part):
            at, _, text = line.partition(" ")
            self._heard = time.monotonic()
            if at > self._seen:
                self._seen = at
                self._last.append(text)
                print(text, flush=True)
            if time.monotonic() > until:
                break
        return True

    def _failure(self, status: dict[str, Any]) -> JobError:
        why = "; ".join(each.get("message", "") for each in status.get("conditions", []) if each["type"] == "Failed")
        text = f"JobSet {self._cluster.name} failed: {why}"
        if not self._failed:
            return JobError("\n".join([text, *self._last]))
        pod = _first(self._failed)
        lines, end = self._cluster.tail(pod) or self._last, self._failed[pod]
        return JobError("\n".join([f"{text}; {pod} {end.why}; the last lines of its log:", *lines]), end.exit_code)


class _End(NamedTuple):
    """Of a pod that failed."""

    start: int  # the how-manieth of all hosts
    at: datetime
    exit_code: int | None
    why: str


def _first(ends: Mapping[str, _End]) -> str:
    """The pod that failed first since the last start: not one that was stopped for it, maybe in the same second."""
    return min(ends, key=lambda pod: (-ends[pod].start, ends[pod].exit_code == 128 + signal.SIGTERM, ends[pod].at))


def _end(pod: Any) -> _End | None:
    if pod.status.phase != "Failed":
        return None
    stopped = next((c.state.terminated for c in pod.status.container_statuses or [] if c.state.terminated), None)
    code, start = stopped.exit_code if stopped else None, int((pod.metadata.labels or {}).get(RESTARTS_LABEL, 0))
    for condition in pod.status.conditions or []:
        if condition.type == "DisruptionTarget" and condition.status == "True":
            why = f"was taken away ({condition.reason}: {condition.message})"
            return _End(start, condition.last_transition_time, code, why)
    if stopped:
        reason = "" if stopped.reason in (None, "Error") else f" ({stopped.reason})"
        return _End(start, stopped.finished_at, code, f"exited with {code}{reason}")
    return _End(start, pod.metadata.creation_timestamp, code, f"failed ({pod.status.reason}: {pod.status.message})")


def _waits_for(pod: Any) -> str:
    """What keeps a pod from running, in the cluster's words."""
    for container in pod.status.container_statuses or []:
        if container.state.waiting and container.state.waiting.message:
            return f"its image or settings: {container.state.waiting.message}"
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            return f"nodes: {condition.message}"
    return ""
