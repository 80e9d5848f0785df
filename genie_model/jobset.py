"""The JobSet that trains a stage on all hosts of a TPU slice: a pod on each, that fail and start again together.

A JobSet (jobset.sigs.k8s.io, 0.10 or newer) is a Kubernetes object that makes Jobs. This file says what is asked for;
launcher.py asks for it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from genie_model.slices import NODE_POOL, RESOURCE, Slice, slice_of

GROUP, VERSION, PLURAL = "jobset.x-k8s.io", "v1alpha2", "jobsets"
NAME_LABEL = "jobset.sigs.k8s.io/jobset-name"  # JobSet puts it on every pod
RESTARTS_LABEL = "jobset.sigs.k8s.io/restart-attempt"  # and how often all started again before
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"  # and Job the host's number
CONTAINER = "train"
DIGEST_LABEL = "genie-digest"  # of what was asked for: two launchers that ask for the same share a JobSet
RUN_ANNOTATION = "genie-pipeline-run"  # that created it, where one did
RUN_VARIABLE = "GENIE_PIPELINE_RUN"  # which names it to the launcher, the same to all tries of a step
METRICS_PORT = 9464
# As `python -m genie_model` exits.
_USER_ERROR, _PREEMPTED = 2, 143


class Job(BaseModel):
    """Where and how a stage is trained: on a slice of TPUs, in the namespace that the launcher may use."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: str = Field(description="of training on TPU, by digest: NAME@sha256:...")
    accelerator: str = Field(description="tpu-v5e, tpu-v5p or tpu-v6e")
    topology: str = Field(description="chips along each axis, e.g. 4x4")
    namespace: str = "genie"
    service_account: str = "genie-trainer"
    spot: bool = Field(False, description="cheaper machines that may be taken away at any time")
    queue: str = Field("", description="Kueue's LocalQueue; empty: without Kueue")
    mlflow_secret: str = Field("", description="a Secret whose keys become environment variables: MLFLOW_TRACKING_...")
    labels: dict[str, str] = Field({}, description="more labels, e.g. for the bill")
    cpu: str = Field("64", description="of each host, whose machines have 112 at least")
    memory: str = Field("128Gi", description="of each host, whose machines have 192 GB at least")
    max_restarts: int = Field(10, ge=0, description="after failures; machines that are taken away do not count")
    deadline_seconds: int = Field(14 * 86_400, ge=60, description="then it is ended, whether it waits or runs")
    grace_seconds: int = Field(300, ge=1, description="to save a checkpoint when it is stopped; Spot gives 30 at most")
    keep_seconds: int = Field(86_400, ge=60, description="how long it can be looked at when it has ended")

    @property
    def slice(self) -> Slice:
        return slice_of(self.accelerator, self.topology)

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        slice_of(self.accelerator, self.topology)
        if not re.fullmatch(r"[^@\s]+@sha256:[0-9a-f]{64}", self.image):
            raise ValueError(f"image {self.image!r} is not pinned: name it by digest, NAME@sha256:<64 hex digits>")
        return self


def job_set(
    job: Job, name: str, command: Sequence[str], environment: Mapping[str, str], run: str = ""
) -> dict[str, Any]:
    """The object to create, for a pipeline's `run` if there is one.

    Any pod that fails ends its Job, and JobSet starts all hosts again, from the last checkpoint: at most `max_restarts`
    times after failures, as often as needed after preemption. An error of the user's ends it for good.
    """
    digest = hashlib.sha256(json.dumps([job.model_dump(), list(command)]).encode()).hexdigest()[:16]
    labels = job.labels | {
        "app.kubernetes.io/name": "genie-train",
        "app.kubernetes.io/component": "training",
        "app.kubernetes.io/part-of": "genie",
        DIGEST_LABEL: digest,
    }
    queue = {"kueue.x-k8s.io/queue-name": job.queue} if job.queue else {}
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            "namespace": job.namespace,
            "labels": labels | queue,
            # all pods on one slice, not on two of the same shape
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": NODE_POOL}
            | ({RUN_ANNOTATION: run} if run else {}),
        },
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "ttlSecondsAfterFinished": job.keep_seconds,
            "failurePolicy": {
                "maxRestarts": job.max_restarts,
                "rules": [  # the first that fits; else: start again, and count it
                    {
                        "name": "userError",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                        "onJobFailureMessagePatterns": [f"failed with exit code {_USER_ERROR} "],
                    },
                    {
                        "name": "deadline",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["DeadlineExceeded"],
                    },
                    {
                        "name": "preemption",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    },
                ],
            },
            "replicatedJobs": [
                {
                    "name": "hosts",
                    "replicas": 1,
                    "template": {
                        "metadata": {"labels": labels},
                        "spec": {
                            "parallelism": job.slice.hosts,
                            "completions": job.slice.hosts,
                            "completionMode": "Indexed",
                            "backoffLimit": 0,
                            "activeDeadlineSeconds": job.deadline_seconds,  # where no launcher looks at the clock
                            "podFailurePolicy": {
                                "rules": [
                                    {
                                        "action": "FailJob",
                                        "onExitCodes": {
                                            "containerName": CONTAINER,
                                            "operator": "In",
                                            "values": [_USER_ERROR, _PREEMPTED],
                                        },
                                    },
                                    {
                                        "action": "FailJob",
                                        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                                    },
                                ]
                            },
                            "template": {"metadata": {"labels": labels}, "spec": _pod(job, command, environment)},
                        },
                    },
                }
            ],
        },
    }


def _pod(job: Job, command: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """GKE adds TPU_WORKER_ID and TPU_WORKER_HOSTNAMES, by which the hosts find each other."""
    asked = {"cpu": job.cpu, "memory": job.memory, RESOURCE: str(job.slice.chips_per_host)}
    variables = {"GENIE_METRICS_PORT": str(METRICS_PORT), "PJRT_DEVICE": "TPU", **environment}
    container = {
        "name": CONTAINER,
        "image": job.image,
        "command": list(command),
        "env": [{"name": key, "value": value} for key, value in variables.items()],
        "envFrom": [{"secretRef": {"name": job.mlflow_secret}}] if job.mlflow_secret else [],
        "ports": [{"name": "metrics", "containerPort": METRICS_PORT, "protocol": "TCP"}],
        "resources": {"requests": asked, "limits": asked},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, {"name": "cache", "mountPath": "/cache"}],
    }
    return {
        "serviceAccountName": job.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,  # or a Service's name becomes a variable
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace_seconds,
        "nodeSelector": job.slice.node_selector(job.spot),
        "tolerations": job.slice.tolerations(job.spot),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 10001,
            "runAsGroup": 10001,
            "fsGroup": 10001,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [{"name": "tmp", "emptyDir": {}}, {"name": "cache", "emptyDir": {}}],
    }
