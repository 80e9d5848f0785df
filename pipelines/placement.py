"""Where a step runs on a cluster: its image and what it asks of a node. Nothing else sets either.

A cluster is described by a TOML file (`--cluster FILE`), of which every field has a default:

    accelerator = "tpu-v5e"                    # of the training steps; or none, nvidia-l4, nvidia-h100-80gb, ...
    topology = "2x4"                           # of a TPU: a slice of several hosts is trained on through a JobSet
    spot = true                                # training goes to nodes that may be taken away, and carries on
    tracking_uri = "http://mlflow.genie:5000"
    root_uri = "gs://bucket/genie"

A step's component names its image bare, as manifests do; the kustomization in `images` says which that is, by digest.
"""

from __future__ import annotations

import contextlib
import tomllib
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from kfp import kubernetes
from kfp.dsl import PipelineTask
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from genie_model.slices import RESOURCE, Slice, slice_of

_CHECKOUT = Path(__file__).parents[1]
_USER = 10001  # of our images
_CACHE = "/cache"
_METRICS_PORT = "9464"
_NO_DIGEST = f"sha256:{'0' * 64}"
_SPOT = "cloud.google.com/gke-spot"
_GPU = "nvidia.com/gpu"
# Argo counts a step's retries from the start of its first try, and gives them up after this long: not after KFP's hour,
# but when even five tries of a week are over.
_RETRY_SECONDS = 45 * 86_400

Size = Literal["small", "medium", "large"]
# As Kubernetes takes them; anything else would be told only by the cluster.
_NAME = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
_KEY = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?$"
_VALUE = r"^([A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?)?$"


class Node(BaseModel):
    """What a step's container is given, no more and no less; one try ends after `hours`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpu: str = Field(pattern=r"^(\d+(\.\d+)?|\d+m)$")
    memory: str = Field(pattern=r"^\d+(\.\d+)?[EPTGMK]i?$")
    hours: int = Field(ge=1)
    retries: int = Field(0, ge=0, description="of what carries on from its last checkpoint: training")


class Cluster(BaseModel):
    """What steps are placed by. Raises ValueError, through `read`, for what does not fit together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: str = Field("manifests/images/kustomization.yaml", description="below this checkout, or absolute")
    namespace: str = Field(
        "genie", pattern=_NAME, description="of training on several hosts; Kubeflow chooses that of other steps"
    )
    accelerator: Literal["none", "nvidia-l4", "nvidia-h100-80gb", "tpu-v5e", "tpu-v5p", "tpu-v6e"] = Field(
        "none", description="of the training steps: one GPU, or a slice of TPU chips"
    )
    topology: str = Field("", description="of a TPU slice, e.g. 2x4")
    spot: bool = Field(False, description="training on nodes that may be taken away")
    tracking_uri: str = Field(
        "http://mlflow.genie:5000", pattern="^https?://.", description="where the form names no other one"
    )
    root_uri: str = Field("", description="the form's default")
    mlflow_secret: str = Field(
        "", pattern=f"^$|{_NAME}", description="a Secret, with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    )
    service_account: str = Field("genie-trainer", pattern=_NAME, description="of training on several hosts")
    queue: str = Field("", description="of training on several hosts: Kueue's LocalQueue; empty: without Kueue")
    labels: dict[Annotated[str, Field(pattern=_KEY)], Annotated[str, Field(pattern=_VALUE)]] = Field(
        {}, description="more labels of every step's pod, e.g. for the bill"
    )
    small: Node = Node(cpu="1", memory="4Gi", hours=2)
    medium: Node = Node(cpu="4", memory="16Gi", hours=24)
    large: Node = Node(cpu="8", memory="32Gi", hours=168, retries=5)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Raises ValueError, one line that names the file, for what is wrong in it."""
        try:
            return cls.model_validate(tomllib.loads(Path(path).read_text()))
        except ValidationError as error:
            wrong = [(".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")) for e in error.errors()]
            raise ValueError(f"{path}: {'; '.join(': '.join(filter(None, each)) for each in wrong)}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise ValueError(f"{path} is no cluster's description: {error}") from None

    @model_validator(mode="after")
    def _slice_fits(self) -> Self:
        if self.slice is None and self.topology:
            raise ValueError(f"topology={self.topology!r} is a TPU slice's, and accelerator={self.accelerator!r}")
        return self

    @property
    def slice(self) -> Slice | None:
        """Of a TPU. Raises ValueError for a topology that there is not."""
        return slice_of(self.accelerator, self.topology) if self.accelerator.startswith("tpu-") else None

    def image(self, name: str) -> str:
        """The image of that bare name, by digest. Raises ValueError where `images` does not pin it."""
        pinned = self._pinned()
        if name not in pinned:
            raise ValueError(f"{_CHECKOUT / self.images} does not pin {name}: `make images` writes it")
        return pinned[name]

    def unpinned(self) -> list[str]:
        """The images that no registry has, for their digest is of zeros."""
        return [name for name, image in self._pinned().items() if image.endswith(_NO_DIGEST)]

    def _pinned(self) -> dict[str, str]:
        path = _CHECKOUT / self.images
        try:
            images = yaml.safe_load(path.read_text())["images"]
            return {image["name"]: f"{image['newName']}@{image['digest']}" for image in images}
        except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
            raise ValueError(f"{path} does not pin images by digest ({error!r}): `make images` writes it") from None


_cluster: ContextVar[Cluster | None] = ContextVar("cluster", default=None)


@contextlib.contextmanager
def placed_on(cluster: Cluster | None) -> Iterator[None]:
    """Steps that are declared inside run there; of none, on this machine, where they have nothing to choose."""
    token = _cluster.set(cluster)
    try:
        yield
    finally:
        _cluster.reset(token)


def place(task: PipelineTask, size: Size, name: str, changes: bool = False) -> PipelineTask:
    """Gives `task` a node of that size, under the `name` that the UI shows.

    KFP's cache goes by image and inputs. A step that `changes` what lies outside of them, as the registry, or that
    looks at it, is not answered from there on a cluster; on one machine `local.py` watches over both.
    """
    task.set_display_name(name)
    if cluster := _cluster.get():
        _equip(task, cluster, getattr(cluster, size), cluster.image(task.container_spec.image))
        if changes:
            task.set_caching_options(False)
    return task


def train(component: Any, name: str, **arguments: Any) -> PipelineTask:
    """The step of a training `component` on the cluster's accelerator, under the `name` that the UI shows.

    On a TPU slice of one host it is the component itself, told how the chips share the work. A KFP step is one pod: of
    several hosts it is the launcher, which has as many pods run the same stage.
    """
    cluster = _cluster.get()
    chips = cluster.slice if cluster else None
    if cluster and chips and chips.hosts > 1:
        return _launched(component, name, cluster, arguments)
    if chips:
        arguments["machine"] = ["parallel.backend=xla", f"parallel.fsdp={chips.chips}"]
    task = place(component(**arguments), "large", name)
    if not cluster:
        return task
    selector, tolerations = _spot() if cluster.spot else ({}, [])
    if chips:
        task.set_container_image(cluster.image("genie-train-tpu"))
        task.set_accelerator_type(RESOURCE).set_accelerator_limit(chips.chips)
        selector, tolerations = chips.node_selector(cluster.spot), chips.tolerations(cluster.spot)
    elif cluster.accelerator != "none":
        task.set_accelerator_type(_GPU).set_accelerator_limit(1)
        selector = selector | {"cloud.google.com/gke-accelerator": cluster.accelerator}
        tolerations = [*tolerations, {"key": _GPU, "operator": "Exists", "effect": "NoSchedule"}]
    for key, value in selector.items():
        kubernetes.add_node_selector(task, key, value)
    kubernetes.add_toleration_json(task, tolerations)
    kubernetes.add_pod_annotation(task, "cluster-autoscaler.kubernetes.io/safe-to-evict", "false")  # not to save a node
    return task


def _launched(component: Any, name: str, cluster: Cluster, arguments: dict[str, Any]) -> PipelineTask:
    from components.launch import launch
    from genie_model.jobset import RUN_VARIABLE, Job

    shared = {"accelerator", "topology", "namespace", "service_account", "spot", "queue", "mlflow_secret", "labels"}
    settings = cluster.model_dump(include=shared) | {"deadline_seconds": _seconds(cluster.large)}
    job = Job(image=cluster.image("genie-train-tpu"), **settings)
    taken = {key: value for key, value in arguments.items() if key in launch.component_spec.inputs}
    task = place(launch(**taken, stage=component.name, job=job.model_dump()), "small", name)
    kubernetes.set_timeout(task, job.deadline_seconds + 3600)  # small, but it waits for the others
    _try_again(task, cluster.large)
    kubernetes.use_field_path_as_env(task, RUN_VARIABLE, "metadata.labels['pipeline/runid']")  # Kubeflow's label
    return task


def _equip(task: PipelineTask, cluster: Cluster, node: Node, image: str) -> None:
    task.set_container_image(image)
    task.set_cpu_request(node.cpu).set_cpu_limit(node.cpu)
    task.set_memory_request(node.memory).set_memory_limit(node.memory)
    _try_again(task, node)
    task.set_env_variable("MLFLOW_TRACKING_URI", cluster.tracking_uri)
    task.set_env_variable("GENIE_METRICS_PORT", _METRICS_PORT)
    task.set_env_variable("GENIE_CACHE_DIR", _CACHE)
    kubernetes.empty_dir_mount(task, "cache", _CACHE, size_limit="60Gi")  # GENIE_CACHE_BYTES is below that
    kubernetes.set_timeout(task, _seconds(node))
    kubernetes.set_image_pull_policy(task, "IfNotPresent")
    kubernetes.set_security_context(task, run_as_user=_USER, run_as_group=_USER, run_as_non_root=True)
    if cluster.mlflow_secret:
        keys = {key: key for key in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")}
        kubernetes.use_secret_as_env(task, cluster.mlflow_secret, keys, optional=True)
    own = {"name": "genie-pipeline", "component": task.component_spec.name, "part-of": "genie"}
    for key, value in (cluster.labels | {f"app.kubernetes.io/{key}": value for key, value in own.items()}).items():
        kubernetes.add_pod_label(task, key, value)


def _spot() -> tuple[dict[str, str], list[dict[str, str]]]:
    """The node selector and the tolerations."""
    return {_SPOT: "true"}, [{"key": _SPOT, "operator": "Equal", "value": "true", "effect": "NoSchedule"}]


def _try_again(task: PipelineTask, node: Node) -> None:
    if node.retries:
        task.set_retry(node.retries, "30s", backoff_factor=2, backoff_max_duration=f"{_RETRY_SECONDS}s")


def _seconds(node: Node) -> int:
    return 3600 * node.hours
