"""Every check, fed with what it is there to find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from manifests import links, pods
from manifests.check import RULES, findings
from manifests.objects import Object, Objects, name_of
from manifests.schema import schema

Rule = Callable[[Objects], Iterator[str]]


def of_schema(objects: Objects) -> Iterator[str]:
    return schema(objects.all)


def spec(one: Object) -> Object:
    found: Object = one["spec"]["template"]["spec"]
    return found


def container(one: Object) -> Object:
    found: Object = spec(one)["containers"][0]
    return found


def put(place: Any, *path_and_value: Any) -> None:
    """put(place, "a", 0, "b", value): sets place["a"][0]["b"]."""
    *path, last, value = path_and_value
    for key in path:
        place = place[key]
    place[last] = value


def drop(place: Any, *path: Any) -> None:
    *path_, last = path
    for key in path_:
        place = place[key]
    del place[last]


SERVING, MLFLOW, POSTGRES = "Deployment/genie-serving", "Deployment/mlflow", "StatefulSet/postgres"
OTHER = "docker.io/library/busybox@sha256:" + "1" * 64
# A rule, the object that is changed (its name may end in a digest), how, and what the rule has to say.
BROKEN: list[tuple[Rule, str, Callable[[Object], object], str]] = [
    (of_schema, SERVING, lambda one: put(one, "spec", "replics", 3), "replics"),
    (of_schema, SERVING, lambda one: put(container(one), "ports", 0, "containerPort", "8000"), "is not of type"),
    (of_schema, SERVING, lambda one: put(one, "kind", "Deploymnt"), "nobody knows Deploymnt"),
    (of_schema, "ServiceMonitor/genie-serving", lambda one: put(one, "spec", "endpoint", []), "endpoint"),
    (of_schema, "PodMonitor/genie-training", lambda one: drop(one, "spec", "selector"), "selector"),
    (of_schema, "PrometheusRule/genie", lambda one: put(one, "spec", "groups", 0, "rules", 0, "four", 1), "four"),
    (
        of_schema, "ExternalSecret/genie-sessions", lambda one: put(one, "spec", "data", 0, "secretkey", "x"),
        "secretkey",
    ),
    (of_schema, "SecretStore/genie", lambda one: put(one, "spec", "provider", "gcp", {}), "gcp"),
    (of_schema, "BackendConfig/genie-serving", lambda one: put(one, "spec", "timeoutSec", "1h"), "timeoutSec"),
    (of_schema, "FrontendConfig/genie-serving", lambda one: put(one, "spec", "redirect", True), "redirect"),
    (of_schema, "ManagedCertificate/genie-serving", lambda one: put(one, "spec", "domains", "x.y"), "domains"),
    (pods.hardened, SERVING, lambda one: drop(spec(one), "securityContext", "runAsNonRoot"), "runAsNonRoot"),
    (pods.hardened, POSTGRES, lambda one: put(spec(one), "securityContext", "runAsUser", 0), "runAsUser"),
    (pods.hardened, MLFLOW, lambda one: drop(spec(one), "securityContext", "seccompProfile"), "seccompProfile"),
    (
        pods.hardened, MLFLOW, lambda one: drop(spec(one), "automountServiceAccountToken"),
        "automountServiceAccountToken",
    ),
    (pods.hardened, SERVING, lambda one: drop(spec(one), "enableServiceLinks"), "enableServiceLinks"),
    (pods.hardened, SERVING, lambda one: put(spec(one), "hostNetwork", True), "hostNetwork"),
    (
        pods.hardened, SERVING, lambda one: spec(one)["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
        "no volumes but configMap",
    ),
    (
        pods.hardened, SERVING,
        lambda one: spec(one)["volumes"].append({"name": "x", "nfs": {"server": "x", "path": "/"}}), "no volumes but",
    ),
    (pods.hardened, SERVING, lambda one: put(container(one), "ports", 0, "hostPort", 8000), "no hostPort"),
    (
        pods.hardened, MLFLOW,
        lambda one: put(container(one), "securityContext", "seccompProfile", {"type": "Unconfined"}), "nothing else in",
    ),
    (
        pods.hardened, MLFLOW, lambda one: put(spec(one), "securityContext", "sysctls", [{"name": "x", "value": "1"}]),
        "no sysctls",
    ),
    (
        pods.hardened, "ConfigMap/mlflow", lambda one: one.update(kind="Pod", spec={"containers": [{"name": "x"}]}),
        "Pod/mlflow-",
    ),
    (pods.hardened, MLFLOW, lambda one: drop(container(one), "securityContext"), "readOnlyRootFilesystem"),
    (
        pods.hardened, MLFLOW, lambda one: put(container(one), "securityContext", "allowPrivilegeEscalation", True),
        "allowPrivilegeEscalation",
    ),
    (
        pods.hardened, MLFLOW, lambda one: put(container(one), "securityContext", "capabilities", {"drop": ["KILL"]}),
        "capabilities drop ALL",
    ),
    (pods.hardened, MLFLOW, lambda one: put(container(one), "securityContext", "privileged", True), "nothing else in"),
    (pods.hardened, MLFLOW, lambda one: put(container(one), "securityContext", "runAsUser", 0), "nothing else in"),
    (pods.images, SERVING, lambda one: put(container(one), "image", "genie-serve:latest"), "not named by digest"),
    (pods.images, SERVING, lambda one: put(container(one), "image", OTHER), "is not of manifests/images"),
    (pods.probes, POSTGRES, lambda one: drop(container(one), "startupProbe"), "has no startupProbe"),
    (
        pods.probes, SERVING, lambda one: put(container(one), "livenessProbe", "httpGet", "path", "/readyz"),
        "waits for a model",
    ),
    (pods.probes, MLFLOW, lambda one: put(container(one), "readinessProbe", "httpGet", "port", 80), "asks port 80"),
    (pods.quantities, MLFLOW, lambda one: drop(container(one), "resources", "limits", "memory"), "no limits of memory"),
    (pods.quantities, MLFLOW, lambda one: put(container(one), "resources", "requests", "cpu", "2core"), "no quantity"),
    (
        pods.quantities, MLFLOW, lambda one: put(container(one), "resources", "requests", "memory", "4Gi"),
        "than its limit",
    ),
    (pods.quantities, SERVING, lambda one: put(spec(one), "volumes", 0, "emptyDir", {}), "has no sizeLimit"),
    (
        pods.quantities, SERVING, lambda one: put(spec(one), "volumes", 0, "emptyDir", "sizeLimit", "9Gi"),
        "may hold more than its ephemeral-storage",
    ),
    (pods.quota, "HorizontalPodAutoscaler/genie-serving", lambda one: put(one, "spec", "maxReplicas", 9), "gpu"),
    (pods.quota, "ResourceQuota/genie", lambda one: put(one, "spec", "hard", "requests.memory", "many"), "no quantity"),
    (pods.quota, "ResourceQuota/genie", lambda one: put(one, "spec", "hard", "requests.storage", "10Gi"), "storage"),
    (pods.replicas, SERVING, lambda one: container(one)["env"].pop(), "need a Redis"),
    (pods.secrets, "ConfigMap/mlflow", lambda one: put(one, "kind", "Secret"), "never kept in git"),
    (pods.secrets, "ConfigMap/mlflow", lambda one: put(one, "data", "PASSWORD", "hunter2"), "PASSWORD looks like"),
    (
        pods.secrets, SERVING, lambda one: container(one)["env"].append({"name": "S",
        "value": "redis://:pw@redis:1/0"}),
        "S looks like",
    ),
    (
        pods.secrets, MLFLOW, lambda one: container(one)["command"].append("postgresql://u:p@host/x"),
        "its command looks",
    ),
    (pods.environment, "ConfigMap/genie-serving", lambda one: put(one, "data", "GENIE_MAX_SESIONS", "9"), "no setting"),
    (
        pods.environment, "ConfigMap/genie-serving", lambda one: put(one, "data", "GENIE_MAX_SESSIONS", "0"),
        "MAX_SESSIONS",
    ),
    (pods.environment, SERVING, lambda one: container(one)["env"].reverse(), "REDIS_PASSWORD is not defined"),
    (pods.environment, "ConfigMap/mlflow", lambda one: drop(one, "data", "EXTRA_HOSTS"), "EXTRA_HOSTS is not defined"),
    (pods.mounts, SERVING, lambda one: drop(spec(one), "volumes", 0), "which it has not"),
    (pods.mounts, SERVING, lambda one: drop(container(one), "volumeMounts", 0), "nothing mounts its volume"),
    (links.selectors, SERVING, lambda one: put(one, "spec", "selector", {"matchLabels": {"a": "b"}}), "its pods"),
    (
        links.selectors, SERVING, lambda one: put(spec(one), "topologySpreadConstraints", 0, "labelSelector",
                                                  {"matchLabels": {"a": "b"}}), "topologySpreadConstraint",
    ),
    (links.selectors, "Service/mlflow", lambda one: put(one, "spec", "selector", {"a": "b"}), "selects no pod"),
    (
        links.selectors, "PodDisruptionBudget/genie-serving",
        lambda one: put(one, "spec", "selector", "matchLabels", {"a": "b"}), "selects no pod",
    ),
    (
        links.selectors, "NetworkPolicy/postgres",
        lambda one: put(one, "spec", "ingress", 0, "from", 0, "podSelector", "matchLabels", {"a": "b"}),
        "selects no pod",
    ),
    (
        links.selectors, "ServiceMonitor/genie-serving",
        lambda one: put(one, "spec", "selector", "matchLabels", {"a": "b"}), "selects no Service",
    ),
    (links.ports, "Service/mlflow", lambda one: put(one, "spec", "ports", 0, "targetPort", "web"), "leads to web"),
    (
        links.ports, "NetworkPolicy/postgres", lambda one: put(one, "spec", "ingress", 0, "ports", 0, "port", 5433),
        "opens port 5433",
    ),
    (
        links.ports, "NetworkPolicy/serving", lambda one: put(one, "spec", "egress", 0, "ports", 0, "port", 5001),
        "opens port 5001",
    ),
    (
        links.ports, "ServiceMonitor/genie-serving", lambda one: put(one, "spec", "endpoints", 0, "port", "x"),
        "no port x",
    ),
    (
        links.ports, "PodMonitor/genie-training", lambda one: put(one, "spec", "podMetricsEndpoints", 0, "port", "x"),
        "no port x",
    ),
    (
        links.ports, "Ingress/genie-serving",
        lambda one: put(one, "spec", "rules", 0, "http", "paths", 0, "backend", "service", "name", "x"), "no Service x",
    ),
    (
        links.ports, "Ingress/genie-serving",
        lambda one: put(one, "spec", "rules", 0, "http", "paths", 0, "backend", "service", "port", {"number": 81}),
        "81",
    ),
    (
        links.ports, "BackendConfig/genie-serving", lambda one: put(one, "spec", "healthCheck", "port", 81),
        "asks port 81",
    ),
    (links.references, MLFLOW, lambda one: put(spec(one), "serviceAccountName", "x"), "no ServiceAccount x"),
    (
        links.references, SERVING, lambda one: put(container(one), "envFrom", 0, "configMapRef", "name", "x"),
        "ConfigMap x",
    ),
    (links.references, POSTGRES, lambda one: put(spec(one), "volumes", 0, "secret", "secretName", "x"), "Secret x"),
    (
        links.references, MLFLOW,
        lambda one: put(container(one), "env", 3, "valueFrom", "secretKeyRef", "key", "x"), "has no key x",
    ),
    (links.references, POSTGRES, lambda one: put(one, "spec", "serviceName", "x"), "no Service x"),
    (
        links.references, "HorizontalPodAutoscaler/genie-serving",
        lambda one: put(one, "spec", "scaleTargetRef", "name", "x"), "no Deployment x",
    ),
    (links.references, "RoleBinding/genie-launcher", lambda one: put(one, "roleRef", "name", "x"), "no Role x"),
    (
        links.references, "RoleBinding/genie-launcher",
        lambda one: one["subjects"].append({"kind": "ServiceAccount", "name": "x", "namespace": "genie"}),
        "ServiceAccount x",
    ),
    (
        links.references, "ExternalSecret/genie-sessions",
        lambda one: put(one, "spec", "secretStoreRef", "name", "x"), "no SecretStore x",
    ),
    (
        links.references, "ExternalSecret/genie-api-keys", lambda one: put(one, "spec", "target", "name", "x"),
        "genie-api-keys",
    ),
    (
        links.references, "Service/genie-serving",
        lambda one: put(one, "metadata", "annotations", "cloud.google.com/backend-config", '{"default": "x"}'),
        "no BackendConfig x",
    ),
    (
        links.references, "Ingress/genie-serving",
        lambda one: put(one, "metadata", "annotations", "networking.gke.io/managed-certificates", "x"),
        "no ManagedCertificate x",
    ),
    (links.namespaces, "Namespace/genie", lambda one: put(one, "kind", "ClusterRole"), "there are 0 Namespaces"),
    (
        links.namespaces, "Namespace/genie",
        lambda one: put(one, "metadata", "labels", "pod-security.kubernetes.io/enforce", "baseline"),
        "enforce: restricted",
    ),
    (links.namespaces, MLFLOW, lambda one: put(one, "metadata", "namespace", "default"), "is in namespace default"),
    (links.namespaces, MLFLOW, lambda one: drop(one, "metadata", "labels"), "needs the label"),
    (
        links.denied, "NetworkPolicy/default-deny", lambda one: put(one, "spec", "policyTypes", ["Ingress"]),
        "denies only",
    ),
    (links.denied, "NetworkPolicy/default-deny", lambda one: put(one, "spec", "egress", [{}]), "no NetworkPolicy that"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "name", "change", "says"), BROKEN, ids=[f"{b[0].__name__}-{b[3]}" for b in BROKEN])
def test_a_check_finds_what_is_broken(
    rendered: Callable[[str], Objects], rule: Rule, name: str, change: Callable[[Object], object], says: str
) -> None:
    objects = rendered("prod")
    assert list(rule(objects)) == []
    (one,) = (one for one in objects.all if name_of(one) == name or name_of(one)[:-11] == name)
    change(one)
    found = list(rule(Objects(objects.all)))
    assert found
    assert any(says in finding for finding in found), found


def test_every_check_is_fed() -> None:
    assert {rule for rule, *_ in BROKEN} == {*RULES, of_schema}


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("namespace", "other", "namespace is other"),
        ("tracking_uri", "http://mlflow.genie.svc.cluster.local:5001", "tracking_uri is not"),
        ("tracking_uri", "http://mlflow.other.svc.cluster.local:5000", "tracking_uri is not"),
        ("root_uri", "gs://other/runs", "in the bucket other"),
        ("service_account", "other", "no ServiceAccount other"),
    ],
)
def test_pipelines_run_where_the_overlay_is(
    rendered: Callable[[str], Objects], field: str, value: str, says: str
) -> None:
    cluster = {
        "namespace": "genie", "tracking_uri": "http://mlflow.genie.svc.cluster.local:5000",
        "root_uri": "gs://mine/runs",
        "service_account": "genie-trainer",
    }  # fmt: skip
    objects = rendered("prod")
    assert list(links.cluster(objects, {"BUCKET": "mine"}, cluster)) == []
    (finding,) = links.cluster(objects, {"BUCKET": "mine"}, cluster | {field: value})
    assert says in finding
    (finding,) = links.cluster(objects, {"BUCKET": "mine"}, {key: one for key, one in cluster.items() if key != field})
    assert finding == f"has no {field}"


def test_what_a_rule_cannot_read_is_a_finding(rendered: Callable[[str], Objects]) -> None:
    """A fault of one object hides none of another."""
    objects = rendered("prod")
    (serving,) = (one for one in objects.all if name_of(one) == SERVING)
    for field in ("resources", "env", "ports"):
        drop(container(serving), field)
    drop(next(one for one in objects.all if name_of(one) == "Namespace/genie"), "metadata", "labels")
    found = list(findings(objects, "prod"))
    assert any("has no requests of cpu" in finding for finding in found)
    assert any("leads to http, which Deployment/genie-serving has not" in finding for finding in found)
    assert any("enforce: restricted" in finding for finding in found)
