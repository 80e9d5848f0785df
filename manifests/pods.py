"""What every pod has to keep to. A rule takes an overlay's objects and says of each that breaks it what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import yaml
from kubernetes.utils.quantity import parse_quantity
from pydantic import ValidationError

from manifests.objects import FOLDER, Object, Objects, name_of
from serving.settings import Settings

IMAGES = FOLDER / "images" / "kustomization.yaml"
# Of what Pod Security `restricted` admits, what there is a use for.
VOLUMES = ("configMap", "secret", "emptyDir", "projected", "persistentVolumeClaim")
# A container's own: anything else, as a user or an Unconfined seccompProfile, would undo what its pod says.
CONFINED = {"allowPrivilegeEscalation", "readOnlyRootFilesystem", "capabilities"}
# What the library reads besides serving's settings.
LIBRARY_VARIABLES = ("GENIE_CACHE_DIR", "GENIE_CACHE_BYTES", "GENIE_METRICS_PORT")
_DIGEST = re.compile(r"^\S+@sha256:[0-9a-f]{64}$")
_SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|API_?KEY", re.IGNORECASE)
_CREDENTIALS = re.compile(r"://[^/\s]*:(?!\$\()[^/@\s]+@")  # a password in a URL, unless it is a variable


def hardened(objects: Objects) -> Iterator[str]:
    """Pod Security `restricted`, and more: a read-only root, a numeric user, no token, no variables of Services."""
    for pod in objects.pods:
        security = pod.spec.get("securityContext", {})
        for name, wanted in {
            "runAsNonRoot": security.get("runAsNonRoot") is True,
            "runAsUser, a number but 0": isinstance(security.get("runAsUser"), int) and security["runAsUser"] > 0,
            "seccompProfile RuntimeDefault": security.get("seccompProfile", {}).get("type") == "RuntimeDefault",
            "automountServiceAccountToken: false": pod.spec.get("automountServiceAccountToken") is False,
            "enableServiceLinks: false": pod.spec.get("enableServiceLinks") is False,
            "no hostNetwork": not any(pod.spec.get(f"host{kind}") for kind in ("Network", "PID", "IPC")),
            f"no volumes but {', '.join(VOLUMES)}": all(
                volume.keys() & set(VOLUMES) for volume in pod.spec.get("volumes", [])
            ),
            "no sysctls": not security.get("sysctls"),
            "no ephemeralContainers": not pod.spec.get("ephemeralContainers"),
        }.items():
            if not wanted:
                yield f"{pod.owner}: its pods need {name}"
    for where, _, container in objects.containers():
        security = container.get("securityContext", {})
        for name, wanted in {
            "allowPrivilegeEscalation: false": security.get("allowPrivilegeEscalation") is False,
            "readOnlyRootFilesystem": security.get("readOnlyRootFilesystem") is True,
            "capabilities drop ALL": security.get("capabilities") == {"drop": ["ALL"]},
            "nothing else in its securityContext": security.keys() <= CONFINED,
            "no hostPort": not any("hostPort" in port for port in container.get("ports", [])),
        }.items():
            if not wanted:
                yield f"{where}: needs {name}"


def images(objects: Objects) -> Iterator[str]:
    """By digest, and all from images/kustomization.yaml."""
    pinned = {f"{one['newName']}@{one['digest']}" for one in yaml.safe_load(IMAGES.read_text())["images"]}
    for where, _, container in objects.containers():
        if not _DIGEST.match(container["image"]):
            yield f"{where}: {container['image']} is not named by digest"
        elif container["image"] not in pinned:
            yield f"{where}: {container['image']} is not of {IMAGES.relative_to(FOLDER.parent)}"


def probes(objects: Objects) -> Iterator[str]:
    """Three for all that runs on, and liveness asks for nothing that others may lack."""
    for pod in objects.pods:
        for container in pod.spec["containers"] if not pod.owner.startswith(("Job/", "CronJob/")) else []:
            where = f"{pod.owner}, container {container['name']}"
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                if probe not in container:
                    yield f"{where}: has no {probe}"
                port = container.get(probe, {}).get("httpGet", {}).get("port")
                if port and not any(
                    port in (one["containerPort"], one.get("name")) for one in container.get("ports", [])
                ):
                    yield f"{where}: its {probe} asks port {port}, which it has not"
            if container.get("livenessProbe", {}).get("httpGet", {}).get("path") == "/readyz":
                yield f"{where}: its livenessProbe waits for a model: without MLflow it would be killed again and again"


def quantities(objects: Objects) -> Iterator[str]:
    """Every container says what it needs and how much it may take, and the first is no more than the second."""
    for where, _, container in objects.containers():
        asked, most = (_parsed(container.get("resources", {}).get(group, {})) for group in ("requests", "limits"))
        for group, found in (("requests", asked), ("limits", most)):
            for resource in ("cpu", "memory"):
                if resource not in found:
                    yield f"{where}: has no {group} of {resource}"
            for resource, value in found.items():
                if value is None:
                    yield f"{where}: its {group} of {resource} is no quantity"
        for resource in asked.keys() & most.keys():
            request, limit = asked[resource], most[resource]
            if request is not None and limit is not None and request > limit:
                yield f"{where}: requests more {resource} than its limit"
    for pod in objects.pods:
        for volume in pod.spec.get("volumes", []):
            if "emptyDir" in volume and not _parsed(volume["emptyDir"]).get("sizeLimit"):
                yield f"{pod.owner}: volume {volume['name']} has no sizeLimit"
        # A pod is evicted for what its volumes hold, too. Init containers run before the others, not beside them.
        early, late = ([_disk(one) for one in pod.spec.get(group, [])] for group in ("initContainers", "containers"))
        if all(late) and sum(map(_size, pod.spec.get("volumes", []))) > max([sum(late), *early]):
            yield f"{pod.owner}: its volumes may hold more than its ephemeral-storage"


def quota(objects: Objects) -> Iterator[str]:
    """All that runs at most, the autoscaler's replicas and a rollout's one more, fits into the ResourceQuota."""
    needed: dict[str, Decimal] = {}
    for workload in objects.of("Deployment", "StatefulSet"):
        count = _most_replicas(objects, workload)
        for container in workload["spec"]["template"]["spec"]["containers"]:
            for resource, value in _parsed(container.get("resources", {}).get("requests", {})).items():
                needed[f"requests.{resource}"] = needed.get(f"requests.{resource}", Decimal()) + count * (
                    value or Decimal()
                )
        for claim in workload["spec"].get("volumeClaimTemplates", []):
            size = _parsed(claim["spec"]["resources"]["requests"])["storage"] or Decimal()
            needed["requests.storage"] = needed.get("requests.storage", Decimal()) + count * size
    for limit in objects.of("ResourceQuota"):
        hard = _parsed(limit["spec"]["hard"])
        for name, value in hard.items():
            if value is None:
                yield f"{name_of(limit)}: {name} is no quantity"
            elif needed.get(name, Decimal()) > value:
                yield f"{name_of(limit)}: all replicas together ask for {needed[name]:f} {name}, over its {value:f}"


def _most_replicas(objects: Objects, workload: Object, surge: bool = True) -> int:
    kind, name = workload["kind"], workload["metadata"]["name"]
    count: int = workload["spec"].get("replicas", 1)
    for scaler in objects.of("HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        if (target["kind"], target["name"]) == (kind, name):
            count = scaler["spec"]["maxReplicas"]
    more = workload["spec"].get("strategy", {}).get("rollingUpdate", {}).get("maxSurge", 0) if surge else 0
    return count + (more if isinstance(more, int) else 1)


def replicas(objects: Objects) -> Iterator[str]:
    """Several pods of serving keep their sessions in one place: whom a balancer sends elsewhere has his world there."""
    for workload in objects.of("Deployment"):
        (container, *_) = workload["spec"]["template"]["spec"]["containers"]
        if "genie-serve@" in container["image"] and _most_replicas(objects, workload, surge=False) > 1:
            stores = [one.get("value", "") for one in container.get("env", []) if one["name"] == "GENIE_SESSION_STORE"]
            if not any(store.startswith(("redis://", "rediss://")) for store in stores):
                yield f"{name_of(workload)}: several replicas need a Redis: components/redis-sessions"


def secrets(objects: Objects) -> Iterator[str]:
    """None in git: no Secret, and nothing that looks like one where it can be read."""
    for secret in objects.of("Secret"):
        yield f"{name_of(secret)}: a Secret is made by hand or by External Secrets, never kept in git"
    named = [
        (name_of(one), key, value) for one in objects.of("ConfigMap") for key, value in one.get("data", {}).items()
    ]
    for where, _, container in objects.containers():
        named += [(where, one["name"], one["value"]) for one in container.get("env", []) if one.get("value")]
        named += [(where, "", word) for word in [*container.get("command", []), *container.get("args", [])]]
    for where, key, value in named:
        is_path = value.startswith("/")
        if (_SECRET.search(key) and not is_path) or _CREDENTIALS.search(value):
            yield f"{where}: {key or 'its command'} looks like a secret in plain text: take it from a Secret"


def environment(objects: Objects) -> Iterator[str]:
    """$(NAME) was defined before, and each GENIE_* is something that serving knows and takes."""
    for where, _, container in objects.containers():
        try:
            found = objects.environment(container)
        except KeyError as error:
            yield f"{where}: the variable or key {error.args[0]} is not defined, or only further down"
            continue
        settings: dict[str, Any] = {}
        for name, value in found.items():
            if not name.startswith("GENIE_") or name in LIBRARY_VARIABLES:
                continue
            field = name.removeprefix("GENIE_").lower()
            if field not in Settings.model_fields:
                yield f"{where}: {name} is no setting of serving: see python -m serving --help"
            else:
                settings[field] = value
        try:
            Settings(**settings)
        except ValidationError as error:
            for problem in error.errors():
                yield f"{where}: GENIE_{'.'.join(map(str, problem['loc'])).upper()}: {problem['msg']}"


def mounts(objects: Objects) -> Iterator[str]:
    """Each mount is of a volume that there is, and each volume is mounted."""
    for pod in objects.pods:
        volumes = {volume["name"] for volume in pod.spec.get("volumes", [])}
        kind, _, name = pod.owner.partition("/")
        owner = objects.get(kind, name) or {}
        volumes |= {one["metadata"]["name"] for one in owner.get("spec", {}).get("volumeClaimTemplates", [])}
        used = {mount["name"] for container in pod.containers for mount in container.get("volumeMounts", [])}
        for volume in used - volumes:
            yield f"{pod.owner}: mounts volume {volume}, which it has not"
        for volume in volumes - used:
            yield f"{pod.owner}: nothing mounts its volume {volume}"


def _size(volume: Object) -> Decimal:
    """What it may take of the node's disk."""
    place = volume.get("emptyDir", {})
    return Decimal() if place.get("medium") == "Memory" else _parsed(place).get("sizeLimit") or Decimal()


def _disk(container: Object) -> Decimal:
    return _parsed(container.get("resources", {}).get("limits", {})).get("ephemeral-storage") or Decimal()


def _parsed(quantities: Object) -> dict[str, Decimal | None]:
    """None for what is no quantity."""
    found: dict[str, Decimal | None] = {}
    for name, value in quantities.items():
        try:
            found[name] = parse_quantity(value)
        except ValueError:
            found[name] = None
    return found


RULES = (hardened, images, probes, quantities, quota, replicas, secrets, environment, mounts)
