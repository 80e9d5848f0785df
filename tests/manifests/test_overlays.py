"""What a cluster would get is whole, and fits what the rest of the platform takes for granted."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from genie_model.jobset import Job, job_set
from manifests import check
from manifests.objects import FOLDER, OVERLAYS, TRAINER, Object, Objects, Pod, matches, overlays, render
from manifests.pods import hardened
from pipelines.placement import Cluster
from serving.app import create_app
from serving.settings import Settings

COMPONENTS = sorted(path.parent.name for path in (FOLDER / "components").glob("*/kustomization.yaml"))


@pytest.mark.parametrize("overlay", overlays())
def test_nothing_is_wrong_with_an_overlay(rendered: Callable[[str], Objects], overlay: str) -> None:
    objects = rendered(overlay)
    assert list(check.findings(objects, overlay)) == []
    assert objects.get("Deployment", "genie-serving")
    lines = [line for line in (OVERLAYS / overlay / "kustomization.yaml").read_text().splitlines() if "#" not in line]
    assert len(lines) <= 16


def rendered_with(folder: Path, *components: str) -> str:
    """base with these components, and settings for all."""
    up = os.path.relpath(FOLDER, folder.resolve())
    chosen = "".join(f"{up}/components/{component}, " for component in (*components, "settings"))
    (folder / "kustomization.yaml").write_text(
        "namespace: genie\n"
        f"resources: [{up}/base]\n"
        f"components: [{chosen}{up}/images]\n"
        "configMapGenerator: [{name: settings, literals: [PROJECT_ID=p, BUCKET=b, HOST=h.example, ADDRESS=203.0.113.7,"
        " ADDRESS_NAME=a, SQL_ADDRESS=10.1.2.3]}]\n"
    )
    return render(folder)


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_does_by_itself(rendered: Callable[[str], Objects], tmp_path: Path, component: str) -> None:
    rendered  # noqa: B018 - it skips where there is no kustomize
    text = rendered_with(tmp_path, component)
    objects = Objects.read(text)
    assert [problem for rule in check.RULES for problem in rule(objects)] == []
    placeholders = r"\b(PROJECT_ID|BUCKET|HOST|ADDRESS|ADDRESS_NAME|SQL_ADDRESS)\b(?!:)"
    assert re.findall(placeholders, re.sub(r"(?m)^ *[A-Z_]+:", "", text)) == []


def test_all_of_mlflow_speaks_to_cloud_sql(rendered: Callable[[str], Objects], tmp_path: Path) -> None:
    """What brings the schema up to date, too."""
    objects = Objects.read(rendered_with(tmp_path, "cloud-sql", "mlflow-upgrade"))
    (pod,) = (pod for pod in objects.pods if pod.owner == "Deployment/mlflow")
    found = [objects.environment(container) for container in pod.containers]
    assert [(one["PGHOST"], one["PGSSLMODE"]) for one in found] == [("10.1.2.3", "require")] * 2


# Who speaks to whom, and at which port; nobody else may.
REACHED = {
    ("Deployment/genie-serving", "Deployment/mlflow", 5000),
    ("Deployment/mlflow", "StatefulSet/postgres", 5432),
    ("JobSet", "Deployment/mlflow", 5000),
    ("JobSet", "JobSet", 9464),
}
MORE = {
    ("Deployment/genie-serving", "StatefulSet/redis", 6379),
    ("CronJob/mlflow-backup", "StatefulSet/postgres", 5432),
    ("CronJob/mlflow-restore", "StatefulSet/postgres", 5432),
}
# From other namespaces, and by address from outside.
COME_IN = {("Deployment/mlflow", 5000, "kubeflow")}
COME_IN_MORE = {
    ("Deployment/genie-serving", 8000, "monitoring"),
    ("Deployment/genie-serving", 8000, "35.191.0.0/16"),
    ("Deployment/genie-serving", 8000, "130.211.0.0/22"),
    ("JobSet", 9464, "monitoring"),
}


@pytest.mark.parametrize("overlay", overlays())
def test_who_needs_another_reaches_him_and_nobody_else_does(rendered: Callable[[str], Objects], overlay: str) -> None:
    objects = rendered(overlay)
    pods = [*objects.pods, TRAINER]
    ports = [(pod, port["containerPort"]) for pod in pods for one in pod.containers for port in one.get("ports", [])]

    def rules(pod: Pod, way: str) -> Iterator[Object]:
        for policy in objects.of("NetworkPolicy"):
            if matches(policy["spec"]["podSelector"], pod.labels):
                yield from policy["spec"].get(way, [])

    def opened(rule: Object, way: str, port: int) -> list[Object]:
        fits = "ports" not in rule or port in [one["port"] for one in rule["ports"]]
        peers: list[Object] = rule[way] if fits else []
        return peers

    def lets(pod: Pod, other: Pod, port: int, policies: str, way: str) -> bool:
        peers = [peer for rule in rules(pod, policies) for peer in opened(rule, way, port)]
        own = [peer["podSelector"] for peer in peers if "podSelector" in peer and "namespaceSelector" not in peer]
        return any(matches(selector, other.labels) for selector in own)

    found = {
        (one.owner, other.owner, port)
        for one in pods
        for other, port in ports
        if lets(one, other, port, "egress", "to") and lets(other, one, port, "ingress", "from")
    }
    assert found == REACHED | (MORE if overlay != "dev" else set())
    came = set()
    for pod, port in ports:
        for peer in (peer for rule in rules(pod, "ingress") for peer in opened(rule, "from", port)):
            labels = peer.get("namespaceSelector", {}).get("matchLabels", {})
            came |= {(pod.owner, port, name) for name in labels.values()}
            came |= {(pod.owner, port, peer["ipBlock"]["cidr"])} if "ipBlock" in peer else set()
    assert came == COME_IN | (COME_IN_MORE if overlay != "dev" else set())


def test_make_manifests_says_what_it_found(
    rendered: Callable[[str], Objects],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(check, "BUILD", FOLDER.parent / "build" / "manifests-tested")
    assert check.main([]) == 0
    assert "checkov is not here" in capsys.readouterr().out
    monkeypatch.setattr(check, "RULES", (lambda objects: ["something is wrong"],))
    assert check.main([]) == 1
    assert "  something is wrong\n" in capsys.readouterr().out


def test_players_reach_all_but_what_is_for_the_cluster(rendered: Callable[[str], Objects]) -> None:
    ingress = rendered("prod").get("Ingress", "genie-serving")
    assert ingress
    (rule,) = ingress["spec"]["rules"]

    def reached(path: str) -> bool:
        exact = [one["path"] for one in rule["http"]["paths"] if one["pathType"] == "Exact"]
        prefixes = [one["path"] for one in rule["http"]["paths"] if one["pathType"] == "Prefix"]
        return path in exact or any(path == prefix or path.startswith(f"{prefix}/") for prefix in prefixes)

    app = create_app(Settings(model_uri="nowhere", session_store=":memory:"))
    paths = {*app.openapi()["paths"], *(getattr(route, "path", "") for route in app.routes)} - {""}
    assert {path for path in paths if not reached(path)} == {"/healthz", "/readyz", "/metrics", "/redoc"}
    assert reached("/v1/sessions/abc/play")


def test_serving_trusts_the_load_balancer_alone(rendered: Callable[[str], Objects]) -> None:
    """Its own address is the last in X-Forwarded-For: not trusted, all players would be one client."""
    objects = rendered("prod")
    deployment = objects.get("Deployment", "genie-serving")
    assert deployment
    environment = objects.environment(deployment["spec"]["template"]["spec"]["containers"][0])
    addresses = environment["GENIE_TRUSTED_PROXIES"].split(",")
    policy = objects.get("NetworkPolicy", "load-balancer")
    assert policy
    proxies = [peer["ipBlock"]["cidr"] for peer in policy["spec"]["ingress"][0]["from"]]
    assert addresses == [*proxies, check.settings("prod")["ADDRESS"]]


@pytest.mark.parametrize("path", sorted(OVERLAYS.glob("*/*.toml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_steps_find_a_node(path: Path) -> None:
    """On nodes of 8 CPUs and 32 GB, as docs/gke.md makes them; accelerators bring nodes of their own."""
    cluster = Cluster.read(path)
    asked = [cluster.small, cluster.medium, *([] if cluster.slice else [cluster.large])]
    assert max(int(node.cpu) for node in asked) <= 6
    assert max(int(node.memory.removesuffix("Gi")) for node in asked) <= 24


@pytest.mark.parametrize("overlay", overlays())
def test_pipelines_take_the_cluster_s_description(rendered: Callable[[str], Objects], overlay: str) -> None:
    """And the trainings on its slice fit into the quota, beside serving, and are the pods that policies mean."""
    cluster = Cluster.read(OVERLAYS / overlay / "cluster.toml")
    assert cluster.slice.hosts > 1
    shared = ("accelerator", "topology", "namespace", "service_account", "spot", "labels")
    job = Job(image=cluster.image("genie-train-tpu"), **{name: getattr(cluster, name) for name in shared})
    made = job_set(job, "train-world-0", ["python3"], {})["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = Pod("JobSet/x", made["template"]["metadata"]["labels"] | TRAINER.labels, made["template"]["spec"])
    assert pod.has_port("metrics")
    assert pod.has_port(9464)

    objects = rendered(overlay)
    trained = Objects([])
    trained.pods = [pod]
    assert list(hardened(trained)) == []
    container = pod.containers[0]
    workload = {
        "kind": "StatefulSet", "metadata": {"name": "train"},
        "spec": {"replicas": made["completions"], "template": {"metadata": {}, "spec": {"containers": [container]}}},
    }  # fmt: skip
    assert [problem for rule in (check.pods.quota,) for problem in rule(Objects([*objects.all, workload]))] == []
    policies = [
        one["metadata"]["name"]
        for one in objects.of("NetworkPolicy")
        if matches(one["spec"]["podSelector"], pod.labels)
    ]
    assert {"default-deny", "dns", "trainers"} <= set(policies)
