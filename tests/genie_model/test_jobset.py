"""What is asked of a cluster: slices, and the JobSet that trains on all hosts of one."""

from __future__ import annotations

from typing import Any

import pytest
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from pydantic import ValidationError

from genie_model.exporter import PORT_VARIABLE
from genie_model.jobset import METRICS_PORT, Job, job_set
from genie_model.slices import TPUS, slice_of

IMAGE = f"genie.example/genie-train-tpu@sha256:{0:064}"
COMMAND = ["python", "-m", "genie_model", "train-world", "tiny"]


def made(**changes: Any) -> dict[str, Any]:
    job = Job.model_validate({"image": IMAGE, "accelerator": "tpu-v5p", "topology": "2x2x4"} | changes)
    return job_set(job, "train-world-1", COMMAND, {"MLFLOW_RUN_ID": "1"})


def pod_of(body: dict[str, Any]) -> dict[str, Any]:
    (job,) = body["spec"]["replicatedJobs"]
    spec: dict[str, Any] = job["template"]["spec"]["template"]["spec"]
    return spec


@pytest.mark.parametrize(
    ("accelerator", "topology", "hosts", "chips_per_host"),
    [
        ("tpu-v5e", "1x1", 1, 1),
        ("tpu-v5e", "2x4", 1, 8),
        ("tpu-v5e", "4x4", 4, 4),
        ("tpu-v5e", "16x16", 64, 4),
        ("tpu-v6e", "2x2", 1, 4),
        ("tpu-v6e", "2x4", 1, 8),
        ("tpu-v6e", "4x8", 8, 4),
        ("tpu-v5p", "2x2x1", 1, 4),
        ("tpu-v5p", "2x2x2", 2, 4),
        ("tpu-v5p", "4x4x4", 16, 4),
    ],
)
def test_hosts_of_slices(accelerator: str, topology: str, hosts: int, chips_per_host: int) -> None:
    found = slice_of(accelerator, topology)
    assert (found.hosts, found.chips_per_host) == (hosts, chips_per_host)
    assert found.hosts * found.chips_per_host == found.chips


def test_every_slice_has_whole_hosts_and_rising_sizes() -> None:
    for accelerator, tpu in TPUS.items():
        slices = [slice_of(accelerator, topology) for topology in tpu.topologies]
        assert all(each.hosts * each.chips_per_host == each.chips for each in slices)
        assert tpu.sizes == sorted(set(tpu.sizes))


@pytest.mark.parametrize(
    ("accelerator", "topology", "why"),
    [
        ("v5p", "2x2x1", "accelerator 'v5p' is no TPU: allowed are tpu-v5e, tpu-v5p, tpu-v6e"),
        ("tpu-v5p", "4x4", "topology '4x4' is none of tpu-v5p: allowed are 2x2x1, 2x2x2"),
        ("tpu-v6e", "", "topology '' is none of tpu-v6e: allowed are 1x1, 2x2, 2x4, 4x4"),
    ],
)
def test_what_is_not_sold_is_told(accelerator: str, topology: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        slice_of(accelerator, topology)
    with pytest.raises(ValidationError, match=why):
        made(accelerator=accelerator, topology=topology)


@pytest.mark.parametrize("image", ["genie-train-tpu", "genie-train-tpu:1.0", f"genie-train-tpu@sha256:{0:063}"])
def test_an_image_that_may_change_is_refused(image: str) -> None:
    with pytest.raises(ValidationError, match="name it by digest"):
        made(image=image)


def test_a_pod_on_each_host_of_one_slice() -> None:
    body = made(spot=True)
    (job,) = body["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["parallelism"], spec["completions"], spec["completionMode"]) == (1, 4, 4, "Indexed")
    annotations = body["metadata"]["annotations"]
    assert annotations == {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    assert body["spec"]["network"]["enableDNSHostnames"], "GKE names the hosts to each other by it"
    pod = pod_of(body)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert {each["key"] for each in pod["tolerations"]} == {"google.com/tpu", "cloud.google.com/gke-spot"}
    assert pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == "4"
    assert "gke-spot" not in str(made())


def with_unknown(body: dict[str, Any], where: str) -> dict[str, Any]:
    part = pod_of(body)["containers"][0] if where == "container" else body["spec"]["failurePolicy"]["rules"][0]
    part["unknown"] = "field"
    return body


def test_it_is_a_job_set_as_published() -> None:
    """Types, and that nothing is in it that the API does not know: Kubeflow's models drop that."""
    for accelerator, topology in (("tpu-v5e", "4x4"), ("tpu-v5p", "2x2x2"), ("tpu-v6e", "16x16")):
        body = made(accelerator=accelerator, topology=topology, spot=True, mlflow_secret="login", queue="tpus")
        assert kept(body) == body
    for where in ("container", "rule"):
        assert kept(with_unknown(made(), where)) != with_unknown(made(), where)
    with pytest.raises(ValidationError):
        kept(made() | {"spec": {"ttlSecondsAfterFinished": "a day"}})


def kept(body: dict[str, Any]) -> dict[str, Any]:
    found = JobsetV1alpha2JobSet.from_dict(body)
    assert found
    known: dict[str, Any] = found.to_dict()
    return known


def test_a_pod_may_do_little() -> None:
    """The restricted Pod Security Standard."""
    pod = pod_of(made())
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    context = container["securityContext"]
    assert context == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/tmp", "/cache"}
    assert all(set(volume) == {"name", "emptyDir"} for volume in pod["volumes"])


def test_its_metrics_are_read_where_training_shows_them() -> None:
    (container,) = pod_of(made())["containers"]
    assert {"name": PORT_VARIABLE, "value": str(METRICS_PORT)} in container["env"]
    assert container["ports"] == [{"name": "metrics", "containerPort": METRICS_PORT, "protocol": "TCP"}]


def test_secrets_and_the_queue_are_named_where_asked_for() -> None:
    body = made(mlflow_secret="mlflow-login", queue="tpus", labels={"team": "worlds"})
    (container,) = pod_of(body)["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": "mlflow-login"}}]
    labels = body["metadata"]["labels"]
    assert (labels["kueue.x-k8s.io/queue-name"], labels["team"]) == ("tpus", "worlds")
    assert "kueue" not in str(made())
    assert pod_of(made())["containers"][0]["envFrom"] == []


def test_the_digest_is_of_what_runs_and_not_of_a_try() -> None:
    job = Job(image=IMAGE, accelerator="tpu-v5p", topology="2x2x4")

    def digest(job: Job, command: list[str], environment: dict[str, str]) -> str:
        label: str = job_set(job, "n", command, environment)["metadata"]["labels"]["genie-digest"]
        return label

    same = digest(job, COMMAND, {})
    assert digest(job, COMMAND, {"MLFLOW_RUN_ID": "2"}) == same
    assert digest(job, [*COMMAND, "--set=seed=1"], {}) != same
    assert digest(job.model_copy(update={"spot": True}), COMMAND, {}) != same
