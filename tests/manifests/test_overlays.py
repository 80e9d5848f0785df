"""What a cluster would get is whole, and fits what the rest of the platform takes for granted."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from genie_model.jobset import Job, job_set
from manifests import check
from manifests.objects import FOLDER, OVERLAYS, TRAINER, Objects, Pod, matches, overlays, render
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


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_does_by_itself(rendered: Callable[[str], Objects], tmp_path: Path, component: str) -> None:
    rendered  # noqa: B018 - it skips where there is no kustomize
    up = os.path.relpath(FOLDER, tmp_path.resolve())
    (tmp_path / "kustomization.yaml").write_text(
        "namespace: genie\n"
        f"resources: [{up}/base]\n"
        f"components: [{up}/components/{component}, {up}/components/settings, {up}/images]\n"
        "configMapGenerator: [{name: settings, literals: [PROJECT_ID=p, BUCKET=b, HOST=h.example, ADDRESS=203.0.113.7,"
        " ADDRESS_NAME=a, SQL_ADDRESS=10.1.2.3]}]\n"
    )
    text = render(tmp_path)
    objects = Objects.read(text)
    assert [problem for rule in check.RULES for problem in rule(objects)] == []
    placeholders = r"\b(PROJECT_ID|BUCKET|HOST|ADDRESS|ADDRESS_NAME|SQL_ADDRESS)\b(?!:)"
    assert re.findall(placeholders, re.sub(r"(?m)^ *[A-Z_]+:", "", text)) == []


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
