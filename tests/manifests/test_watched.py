"""Alerts and the dashboard ask for figures that serving and training really have."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from genie_model.exporter import READINGS, Exporter
from manifests.objects import FOLDER, Objects
from serving.app import create_app
from serving.settings import Settings

MONITORING = FOLDER / "components" / "monitoring"
# Put on by Prometheus where it scrapes, beside its own series.
TARGET_LABELS = {"namespace", "pod", "job", "instance", "container", "service", "endpoint"}
OWN_SERIES = {"up"}


def alerts() -> list[dict[str, Any]]:
    (rules,) = yaml.safe_load_all((MONITORING / "alerts.yaml").read_text())
    return [rule for group in rules["spec"]["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    return [panel for panel in found if panel["type"] != "row"]


def queries() -> dict[str, str]:
    """PromQL by where it is asked."""
    found = {rule["alert"]: rule["expr"] for rule in alerts()}
    for panel in panels():
        for target in panel["targets"]:
            query = target["expr"].replace("$__rate_interval", "5m").replace("$namespace", "genie")
            found[f"{panel['title']} {target['refId']}"] = query
    adapter = yaml.safe_load((MONITORING / "prometheus-adapter.yaml").read_text())
    for rule in adapter["rules"]["custom"]:
        found[f"prometheus-adapter {rule['name']['as']}"] = rule["seriesQuery"]
    return found


@pytest.fixture(scope="module")
def series(tiny_model_uri: str) -> dict[str, list[dict[str, str]]]:
    """The labels of each series that a service has which was played, and a training that runs."""
    texts = []
    app = create_app(Settings(model_uri=tiny_model_uri, session_store=":memory:"))
    app.state.engine.models.refresh()
    with TestClient(app) as client:
        session = client.post(
            "/v1/sessions", data={"start_frame": client.get("/v1/starts").json()["start_frames"][0]["name"]}
        )
        assert client.post(f"/v1/sessions/{session.json()['id']}/step", json={"action": 0}).status_code == 200
        texts.append(client.get("/metrics").text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENIE_METRICS_PORT", "0")
        exporter = Exporter("train-world", lambda: 1.0)
    exporter.open()
    exporter.read(dict.fromkeys(READINGS, 0.5), step=1)
    exporter.stalled.set(0)
    with urllib.request.urlopen(exporter.address) as answer:
        texts.append(answer.read().decode())
    exporter.close()
    found: dict[str, list[dict[str, str]]] = {}
    for text in texts:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, []).append(sample.labels)
    return found


def selected(node: Any, by: frozenset[str] = frozenset()) -> Iterator[tuple[str, Any, frozenset[str]]]:
    """The series of an expression: name, matchers, and the labels that are asked for around them."""
    if isinstance(node, promql.VectorSelector):
        yield node.name, node.matchers.matchers, by
    elif isinstance(node, promql.MatrixSelector):
        yield from selected(node.vector_selector, by)
    elif isinstance(node, promql.AggregateExpr):
        labels = node.modifier.labels if node.modifier else []
        yield from selected(node.expr, by | set(labels))
    elif isinstance(node, promql.Call):
        for argument in node.args:
            yield from selected(argument, by)
    elif isinstance(node, promql.BinaryExpr):
        yield from selected(node.lhs, by)
        yield from selected(node.rhs, by)
    elif isinstance(node, promql.ParenExpr | promql.SubqueryExpr | promql.UnaryExpr):
        yield from selected(node.expr, by)
    else:
        assert isinstance(node, promql.NumberLiteral | promql.StringLiteral), type(node)


def missing(query: str, series: dict[str, list[dict[str, str]]]) -> list[str]:
    """What a query asks for that nobody has."""
    found = []
    for name, matchers, by in selected(promql.parse(query)):
        if name in OWN_SERIES:
            continue
        there = series.get(name, [])
        labels = {label for one in there for label in one} | TARGET_LABELS
        if not there:
            found.append(name)
        found += [f"{name} by {label}" for label in by if label not in labels]
        for matcher in matchers:
            if matcher.name not in labels:
                found.append(f"{name}{{{matcher.name}}}")
            elif matcher.name not in TARGET_LABELS and str(matcher.op) == "MatchOp.Equal":
                values = {one.get(matcher.name) for one in there}
                found += [] if matcher.value in values else [f"{name}{{{matcher.name}={matcher.value}}}"]
    return found


@pytest.mark.parametrize("where", queries())
def test_a_query_asks_for_what_there_is(series: dict[str, list[dict[str, str]]], where: str) -> None:
    assert missing(queries()[where], series) == []


@pytest.mark.parametrize(
    ("query", "lacks"),
    [
        ("rate(genie_frame_total[5m])", ["genie_frame_total"]),
        ("sum by (phases) (genie_step_seconds_bucket)", ["genie_step_seconds_bucket by phases"]),
        ('sum(genie_step_seconds_bucket{kind="total"}) / 2', ["genie_step_seconds_bucket{kind}"]),
        ('genie_step_seconds_bucket{phase="all"}', ["genie_step_seconds_bucket{phase=all}"]),
        ("max(genie_training_speed) > 1 unless genie_queue", ["genie_training_speed"]),
    ],
)
def test_a_query_for_what_there_is_not_would_be_found(
    series: dict[str, list[dict[str, str]]], query: str, lacks: list[str]
) -> None:
    assert missing(query, series) == lacks


def test_the_autoscaler_s_metric_is_the_adapter_s(rendered: Callable[[str], Objects]) -> None:
    adapter = yaml.safe_load((MONITORING / "prometheus-adapter.yaml").read_text())
    names = [rule["name"]["as"] for rule in adapter["rules"]["custom"]]
    for overlay in ("staging", "prod"):
        scaler = rendered(overlay).get("HorizontalPodAutoscaler", "genie-serving")
        assert scaler
        assert [one["pods"]["metric"]["name"] for one in scaler["spec"]["metrics"] if one["type"] == "Pods"] == names


def test_alerts_ring_when_they_should(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool here: install prometheus")
    (rules,) = yaml.safe_load_all((MONITORING / "alerts.yaml").read_text())
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules["spec"]))
    cases = yaml.safe_load((Path(__file__).parent / "alerts.yaml").read_text())
    tested = {one["alertname"] for test in cases["tests"] for one in test["alert_rule_test"] if one.get("exp_alerts")}
    assert tested == {rule["alert"] for rule in alerts()}
    (tmp_path / "cases.yaml").write_text(yaml.safe_dump(cases | {"rule_files": ["rules.yaml"]}))
    done = subprocess.run([promtool, "test", "rules", "cases.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_has_no_panel_over_another() -> None:
    places = [panel["gridPos"] for panel in panels()]
    cells = [
        (x, y) for at in places for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert all(re.fullmatch(r"\$\{datasource\}", panel["datasource"]["uid"]) for panel in panels())
