"""An overlay as kustomize renders it, and what the checks look for in it."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from kubernetes.utils.quantity import parse_quantity

Object = dict[str, Any]

FOLDER = Path(__file__).parent
OVERLAYS = FOLDER / "overlays"
WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job", "CronJob", "Pod")
CLUSTER_SCOPED = ("Namespace", "PriorityClass", "ClusterRole", "ClusterRoleBinding", "StorageClass")
_VARIABLE = re.compile(r"\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)")  # $$(NAME) is not used here


def overlays() -> list[str]:
    return sorted(path.parent.name for path in OVERLAYS.glob("*/kustomization.yaml"))


def render(folder: Path) -> str:
    """The YAML of an overlay's objects. Raises ValueError: kustomize's own words, or that there is none."""
    if kubectl := shutil.which("kubectl"):
        command = [kubectl, "kustomize"]
    elif kustomize := shutil.which("kustomize"):
        command = [kustomize, "build"]
    else:
        raise ValueError("there is neither kubectl nor kustomize here: install one of them")
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{folder} does not render: {done.stderr.strip()}")
    return done.stdout


@dataclass(frozen=True)
class Pod:
    """What runs: the template of `owner`, or what another program makes in the namespace."""

    owner: str
    labels: Mapping[str, str]
    spec: Object

    @property
    def containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    def has_port(self, port: int | str) -> bool:
        ports = [one for container in self.containers for one in container.get("ports", [])]
        return any(port in (one["containerPort"], one.get("name")) for one in ports)


# The pods of a JobSet, as genie_model/launcher.py makes them.
TRAINER = Pod(
    "JobSet",
    {"jobset.sigs.k8s.io/jobset-name": "train"},
    {"containers": [{"name": "train", "ports": [{"name": "metrics", "containerPort": 9464}]}]},
)


class Objects:
    """All objects of one overlay."""

    def __init__(self, objects: list[Object]) -> None:
        self.all = objects
        self.pods = [
            Pod(name_of(one), template.get("metadata", {}).get("labels", {}), template["spec"])
            for one in self.of(*WORKLOADS)
            if (template := _template(one))
        ]

    @classmethod
    def read(cls, text: str) -> Objects:
        return cls([one for one in yaml.safe_load_all(text) if one])

    def of(self, *kinds: str) -> Iterator[Object]:
        return (one for one in self.all if one["kind"] in kinds)

    def get(self, kind: str, name: str) -> Object | None:
        return next((one for one in self.of(kind) if one["metadata"]["name"] == name), None)

    def selected(self, selector: Object) -> list[Pod]:
        """The pods that a selector of labels selects, those of trainings among them."""
        return [pod for pod in (*self.pods, TRAINER) if matches(selector, pod.labels)]

    def containers(self) -> Iterator[tuple[str, Pod, Object]]:
        """Each with where it is, in words."""
        for pod in self.pods:
            for container in pod.containers:
                yield f"{pod.owner}, container {container['name']}", pod, container

    def environment(self, container: Object) -> dict[str, str]:
        """As the container gets it; what only the cluster knows, as <name>. Raises KeyError for what is not there."""
        found: dict[str, str] = {}
        for source in container.get("envFrom", []):
            if reference := source.get("configMapRef"):
                found |= (self.get("ConfigMap", reference["name"]) or {}).get("data", {})
        for one in container.get("env", []):
            found[one["name"]] = expand(one["value"], found) if "value" in one else self._from(one, container)
        return found

    def _from(self, variable: Object, container: Object) -> str:
        source = variable.get("valueFrom", {})
        if reference := source.get("configMapKeyRef"):
            data: Mapping[str, str] = (self.get("ConfigMap", reference["name"]) or {}).get("data", {})
            return data[reference["key"]]
        if field := source.get("resourceFieldRef"):
            group, _, name = field["resource"].partition(".")
            return str(math.ceil(parse_quantity(container["resources"][group][name])))
        return f"<{variable['name']}>"


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Puts in $(NAME) as the kubelet does. Raises KeyError for one that was not defined before."""
    return _VARIABLE.sub(lambda found: variables[found[1]], text)


def name_of(one: Object) -> str:
    return f"{one['kind']}/{one['metadata']['name']}"


def matches(selector: Object, labels: Mapping[str, str]) -> bool:
    """Whether a LabelSelector selects what carries the labels."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for wanted in selector.get("matchExpressions", []):
        there, value = wanted["key"] in labels, labels.get(wanted["key"])
        met = {
            "In": there and value in wanted.get("values", []),
            "NotIn": value not in wanted.get("values", []),
            "Exists": there,
            "DoesNotExist": not there,
        }
        if not met[wanted["operator"]]:
            return False
    return True


def _template(workload: Object) -> Object | None:
    if workload["kind"] == "Pod":
        return workload
    spec = workload["spec"]
    template: Object | None = spec["jobTemplate"]["spec"]["template"] if "jobTemplate" in spec else spec.get("template")
    return template
