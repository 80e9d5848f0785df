"""What steps ask of a cluster, read from the compiled YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from renew_golden import GOLDEN, compiled

from genie_model.presets import preset_names
from pipelines.catalog import PIPELINES, UPKEEP, pipeline_named
from pipelines.placement import Cluster

DAY = 86_400


def executors(case: str) -> dict[str, dict[str, Any]]:
    """Each step's container, with what Kubernetes is told of its pod."""
    pipeline, platform = compiled(case)
    told = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return {
        name.removeprefix("exec-"): executor["container"] | told[name]
        for name, executor in pipeline["deploymentSpec"]["executors"].items()
    }


def tasks(case: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compiled(case)[0]["root"]["dag"]["tasks"]
    return found


@pytest.mark.parametrize("case", ["coinrun", "cloning", "scaling", "champion", "coinrun_tpu", "coinrun_tpu_hosts"])
def test_every_step_has_a_pinned_image_bounds_and_a_user(case: str) -> None:
    for name, step in executors(case).items():
        assert "@sha256:" in step["image"], name
        resources = step["resources"]
        assert resources["resourceCpuRequest"] == resources["resourceCpuLimit"], name
        assert resources["resourceMemoryRequest"] == resources["resourceMemoryLimit"], name
        assert 0 < int(step["activeDeadlineSeconds"]) < 8 * DAY, name
        assert step["securityContext"] == {"runAsUser": "10001", "runAsGroup": "10001", "runAsNonRoot": True}, name
        assert step["imagePullPolicy"] == "IfNotPresent", name
        assert step["emptyDirMounts"][0]["mountPath"] == "/cache", name
        assert step["podMetadata"]["labels"]["app.kubernetes.io/part-of"] == "genie", name
        environment = {variable["name"]: variable["value"] for variable in step["env"]}
        assert environment["MLFLOW_TRACKING_URI"] == "http://mlflow.genie:5000", name
        assert environment["GENIE_METRICS_PORT"] == "9464", name


def test_training_runs_in_its_own_image_and_all_else_where_procgen_is() -> None:
    images = {name: step["image"].split("/")[1].split("@")[0] for name, step in executors("cloning").items()}
    assert {name for name, image in images.items() if image == "genie-train"} == {
        "train-tokenizer",
        "train-world",
        "train-policy",
        "train-policy-2",
    }
    assert set(images.values()) == {"genie-train", "genie-collect"}


def test_a_tpu_goes_to_the_training_steps_alone() -> None:
    steps = executors("coinrun_tpu")
    for name in ("train-tokenizer", "train-world"):
        step = steps[name]
        assert step["image"] == f"registry.example/genie-train-tpu@sha256:{'3' * 64}"
        assert step["resources"]["accelerator"]["resourceType"] == "google.com/tpu"
        assert step["resources"]["accelerator"]["resourceCount"] == "4"
        assert step["nodeSelector"]["labels"] == {
            "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
            "cloud.google.com/gke-tpu-topology": "2x2",
            "cloud.google.com/gke-spot": "true",
        }
        assert {toleration["key"] for toleration in step["tolerations"]} == {
            "google.com/tpu",
            "cloud.google.com/gke-spot",
        }
        assert step["podMetadata"]["annotations"] == {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
        machine = tasks("coinrun_tpu")[name]["inputs"]["parameters"]["machine"]["runtimeValue"]["constant"]
        assert machine == ["parallel.backend=xla", "parallel.fsdp=4"]
    for name in steps.keys() - {"train-tokenizer", "train-world"}:
        assert "accelerator" not in steps[name]["resources"]
        assert "nodeSelector" not in steps[name]
        assert "tolerations" not in steps[name]
    for step in steps.values():
        assert step["secretAsEnv"][0]["secretName"] == "mlflow-login"
        assert step["secretAsEnv"][0]["optional"] is True
        assert step["podMetadata"]["labels"]["team"] == "worlds"


def test_a_gpu_needs_no_other_image() -> None:
    step = executors("coinrun_gpu")["train-world"]
    assert step["image"].startswith("registry.example/genie-train@")
    assert step["resources"]["accelerator"] == {
        "count": "1",
        "resourceCount": "1",
        "resourceType": "nvidia.com/gpu",
        "type": "nvidia.com/gpu",
    }
    assert step["nodeSelector"]["labels"] == {"cloud.google.com/gke-accelerator": "nvidia-l4"}


def test_a_slice_of_several_hosts_is_trained_on_by_the_launcher() -> None:
    steps = executors("coinrun_tpu_hosts")
    assert "train-world" not in steps
    for task in (task for name, task in tasks("coinrun_tpu_hosts").items() if name.startswith("launch")):
        inputs = task["inputs"]["parameters"]
        job = inputs["job"]["runtimeValue"]["constant"]
        assert job["image"] == f"registry.example/genie-train-tpu@sha256:{'3' * 64}"
        assert (job["accelerator"], job["topology"], job["spot"]) == ("tpu-v5e", "4x4", True)
        assert job["mlflow_secret"] == "mlflow-login"
        assert inputs["data_uri"]["taskOutputParameter"]["producerTask"] == "collect"
        assert "retryPolicy" in task
    stages = {
        task["inputs"]["parameters"]["stage"]["runtimeValue"]["constant"]
        for name, task in tasks("coinrun_tpu_hosts").items()
        if name.startswith("launch")
    }
    assert stages == {"train-tokenizer", "train-world"}
    assert steps["launch"]["image"].startswith("registry.example/genie-collect@")


def test_what_saves_itself_is_tried_again_for_as_long_as_its_tries_may_take() -> None:
    for name, task in tasks("coinrun").items():
        assert ("retryPolicy" in task) == name.startswith("train"), name
    policy = tasks("coinrun")["train-world"]["retryPolicy"]
    assert policy["maxRetryCount"] == 5
    # Argo gives retries up this long after the first try began: KFP's default is an hour.
    tries = (1 + policy["maxRetryCount"]) * int(executors("coinrun")["train-world"]["activeDeadlineSeconds"])
    assert int(policy["backoffMaxDuration"].rstrip("s")) >= tries


def test_steps_that_change_the_registry_or_look_at_what_lies_there_are_never_cached() -> None:
    cached = {name for name, task in tasks("coinrun").items() if task.get("cachingOptions", {}).get("enableCache")}
    assert cached == {"train-tokenizer", "train-world", "evaluate"}
    for name in UPKEEP:
        assert all(not task["cachingOptions"].get("enableCache") for task in tasks(name).values())


def test_what_is_made_of_a_data_set_is_cached_by_its_content() -> None:
    for name in ("train-tokenizer", "train-world", "evaluate"):
        digest = tasks("coinrun")[name]["inputs"]["parameters"]["data_digest"]["taskOutputParameter"]
        assert digest == {"outputParameterKey": "data_digest", "producerTask": "collect"}


@pytest.mark.parametrize("name", PIPELINES)
def test_the_form_explains_itself(name: str) -> None:
    form = compiled(name)[0]["root"]["inputDefinitions"]["parameters"]
    assert all(field["description"] for field in form.values())
    if "preset" in form:
        assert all(preset in form["preset"]["description"] for preset in preset_names())


def test_here_a_step_has_nothing_of_a_cluster() -> None:
    for name in PIPELINES:
        pipeline = pipeline_named(name)
        assert "retry_policy" not in str(pipeline.pipeline_spec)
        assert "resources" not in str(pipeline.pipeline_spec.deployment_spec)
        assert "kubernetes" not in pipeline.platform_spec.platforms


@pytest.mark.parametrize(
    ("toml", "problem"),
    [
        ('acclerator = "none"', "acclerator: Extra inputs are not permitted"),
        ('accelerator = "tpu-v7"', "accelerator: Input should be"),
        ('accelerator = "tpu-v5e"', "topology"),
        ('accelerator = "tpu-v5e"\ntopology = "3x5"', "3x5"),
        ('accelerator = "nvidia-l4"\ntopology = "2x2"', "is a TPU slice's"),
        ("spot = 2 GPUs", "is no cluster's description"),
        ('[large]\ncpu = "8"', "large.memory: Field required"),
        ('[small]\ncpu = "lots"\nmemory = "4Gi"\nhours = 1', "small.cpu: String should match"),
        ('[small]\ncpu = "1"\nmemory = "4 GB"\nhours = 1', "small.memory: String should match"),
        ('labels = {"my team" = "worlds"}', "labels.my team"),
        ('labels = {team = "my worlds"}', "labels.team: "),
        ('namespace = "Genie"', "namespace: String should match"),
        ('mlflow_secret = "a secret"', "mlflow_secret: String should match"),
        ('tracking_uri = "mlflow:5000"', "tracking_uri: String should match"),
        ("labels = {team = '\x80'}", "is no cluster's description: 'utf-8' codec"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused_in_one_line(toml: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(toml, encoding="latin-1")
    with pytest.raises(ValueError, match=problem) as refused:
        Cluster.read(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_images_that_nobody_pinned_are_told(tmp_path: Path) -> None:
    assert Cluster(images=str(GOLDEN / "images.yaml")).unpinned() == []
    (tmp_path / "images.yaml").write_text(
        f"images:\n- {{name: genie-collect, newName: here/it, digest: 'sha256:{'0' * 64}'}}\n"
    )
    cluster = Cluster(images=str(tmp_path / "images.yaml"))
    assert cluster.unpinned() == ["genie-collect"]
    with pytest.raises(ValueError, match=r"does not pin genie-train: `make images` writes it"):
        cluster.image("genie-train")
    with pytest.raises(ValueError, match="does not pin images"):
        Cluster(images="nowhere.yaml").image("genie-train")
