"""The paper's comparisons as pipelines: what they compile to, and one run at its smallest with kfp.local."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from components.find_world import find_world

ROOT = Path(__file__).parents[2]
Command = Callable[..., Any]  # conftest's
STUDIES = ("lam_inputs", "tokenizers", "scaling")


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_compiles_with_a_typed_form(study: str, command: Command, tmp_path: Path) -> None:
    done = command("compile", study, "--preset", "demo", "--seeds", "3", "4", "--set", "train_world.steps=9")
    assert (done.returncode, done.stderr) == (0, "")
    pipeline, _ = yaml.safe_load_all((tmp_path / "build" / f"{study}.yaml").read_text())
    form = pipeline["root"]["inputDefinitions"]["parameters"]
    assert all(field["description"] for field in form.values())
    shown = {name: (field["parameterType"], field.get("defaultValue")) for name, field in form.items()}
    assert shown["seeds"] == ("LIST", [3, 4])
    assert shown["variants"] == ("LIST", [])
    assert shown["overrides"] == ("LIST", ["train_world.steps=9"])
    assert shown["root_uri"][0] == "STRING"
    cells = pipeline["components"]["comp-for-loop-2"]["dag"]["tasks"]
    assert list(cells) == ["evaluate", "train-tokenizer-2", "train-world"]
    report = pipeline["root"]["dag"]["tasks"]["report"]
    assert report["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}, "whatever becomes of the cells"


def test_cloning_takes_a_world_or_trains_one(command: Command, tmp_path: Path) -> None:
    done = command("compile", "cloning", "--model", "gs://bucket/world", "--variant", "hard")
    assert (done.returncode, done.stderr) == (0, "")
    pipeline, _ = yaml.safe_load_all((tmp_path / "build" / "cloning.yaml").read_text())
    form = pipeline["root"]["inputDefinitions"]["parameters"]
    assert all(field["description"] for field in form.values())
    shown = {name: (field["parameterType"], field.get("defaultValue")) for name, field in form.items()}
    assert shown["model_uri"] == ("STRING", "gs://bucket/world")
    assert shown["variants"] == ("LIST", ["hard"])
    assert shown["seeds"] == ("LIST", [0, 1, 2, 3, 4])
    tasks = [set(part["dag"]["tasks"]) for part in pipeline["components"].values() if "dag" in part]
    assert {"collect", "train-tokenizer", "train-world"} in tasks
    assert {"find-world"} in tasks
    assert {"demonstrate-2", "train-policy", "train-policy-2", "evaluate-policies"} in tasks
    report = pipeline["root"]["dag"]["tasks"]["report"]
    assert report["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}, "whatever becomes of the cells"


def test_curation_trains_on_each_data_set_and_none_of_it_is_from_a_cache_of_uris(
    command: Command, tmp_path: Path
) -> None:
    given = ("--data", "gs://bucket/genie/datasets/video-1", "--labels", "gs://bucket/labels.json")
    done = command("compile", "curation", *given, "--set", "curation.threshold=0.9")
    assert (done.returncode, done.stderr) == (0, "")
    pipeline, _ = yaml.safe_load_all((tmp_path / "build" / "curation.yaml").read_text())
    form = pipeline["root"]["inputDefinitions"]["parameters"]
    assert all(field["description"] for field in form.values())
    assert {name: form[name].get("defaultValue") for name in ("data_uri", "labels_uri", "overrides")} == {
        "data_uri": "gs://bucket/genie/datasets/video-1",
        "labels_uri": "gs://bucket/labels.json",
        "overrides": ["curation.threshold=0.9"],
    }
    tasks = pipeline["root"]["dag"]["tasks"]
    assert not any(tasks[name]["cachingOptions"].get("enableCache") for name in ("train-curator", "score"))
    cells = pipeline["components"]["comp-for-loop-2"]["dag"]["tasks"]
    assert list(cells) == ["curate-2", "evaluate", "train-tokenizer", "train-world"]
    for name in ("train-tokenizer", "train-world", "evaluate"):
        source = cells[name]["inputs"]["parameters"]["data_uri"]["taskOutputParameter"]
        assert source == {"outputParameterKey": "data_uri", "producerTask": "curate-2"}
    digest = cells["evaluate"]["inputs"]["parameters"]["eval_digest"]
    assert 'parseJson(string_value)["eval_digest"]' in digest["parameterExpressionSelector"], "of what is there now"
    assert tasks["report"]["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}


def test_compiling_a_study_needs_no_torch() -> None:
    named = ", ".join(f"pipelines.{study}" for study in (*STUDIES, "cloning", "curation"))
    program = f"import sys, {named}; assert not {{'torch', 'mlflow', 'procgen'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compile", "coinrun", "--seeds", "1"], "--seeds and --variant are for studies"),
        (["compile", "scaling", "--model", "world"], "--model is for what goes on from a trained world"),
        (["compile", "scaling", "--labels", "labels.json"], "--labels is for video and curation"),
        (["run", "curation", "--preset", "tiny", "--data", "somewhere"], "curation needs --data, what was ingested"),
        (["run", "lam_inputs", "--preset", "tiny", "--variant", "pixel"], "did you mean 'pixels'"),
        (["report", "lam_inputs", "--state", "nowhere"], "there is no MLflow store"),
        (["report", "lam_inputs", "--tracking-uri", "sqlite:///empty.db"], "no experiment 'genie'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments: list[str], message: str, command: Command) -> None:
    done = command(*arguments)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]


def test_a_step_that_fails_before_the_cells_is_named_as_such(command: Command, tmp_path: Path) -> None:
    asked = ["run", "curation", "--preset", "tiny", "--data", "nowhere", "--labels", "nowhere.json", "--state", "state"]
    done = command(*asked, "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db")
    assert done.returncode == 1
    assert "[train-curator] error: there is no data set at nowhere" in done.stdout
    (reason,) = done.stderr.splitlines()[-1:]
    assert reason.startswith("pipelines: cells or a step before them failed, for the reason above")


def test_a_study_runs_cell_by_cell_and_is_reported_from_mlflow_alone(command: Command, tmp_path: Path) -> None:
    store = ["--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    asked = ["run", "lam_inputs", "--preset", "tiny", "--variant", "pixels", "--variant", "tokens", "--state", "state"]
    done = command(*asked, "--seeds", "0", *store)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("[train-world] done in") == 2
    assert "[report] done in" in done.stdout
    for noise in ("KFP Executor", '"inputs"', "Output:", "metadata=", "expression selector"):
        assert noise not in done.stdout
    (page,) = tmp_path.glob("state/kfp/outputs/*/report/page")
    assert "data:image/png;base64," in page.read_text()

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("genie")
    assert experiment is not None
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    (study,) = (run for run in runs.values() if "mlflow.parentRunId" not in run.data.tags)
    cells = {run.data.tags["variant"]: run for run in runs.values() if "variant" in run.data.tags}
    assert set(cells) == {"pixels", "tokens"}
    assert {run.data.tags["mlflow.parentRunId"] for run in cells.values()} == {study.info.run_id}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    for cell in cells.values():
        assert {"delta_psnr_t4", "fvd_random3d", "final_dynamics_cross_entropy"} <= set(cell.data.metrics)
        assert len(cell.data.tags["dataset.eval.digest"]) >= 32
        assert "mlflow.source.git.commit" in cell.data.tags

    made = command("report", "lam_inputs", *store)
    assert made.returncode == 0, made.stderr
    assert "| tokens | 1 |" in made.stdout
    assert (tmp_path / "build" / "lam_inputs.md").read_text() in made.stdout
    assert "data:image/png;base64," in (tmp_path / "build" / "lam_inputs.html").read_text()

    again = command(*asked, "--seeds", "0", *store)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("done in") == again.stdout.count("[report] done in") == 1
    assert len(client.search_runs([experiment.experiment_id])) == len(runs)

    asked = ["run", "lam_inputs", "--preset", "tiny", "--variant", "tokens", "--state", "state"]
    more = command(*asked, "--seeds", "1", *store)
    assert more.returncode == 0, more.stdout + more.stderr
    kept = client.get_run(study.info.run_id)
    assert kept.info.status == "FINISHED"
    assert "| tokens | 2 |" in kept.data.tags["mlflow.note.content"]


def test_a_stop_ends_all_cells_those_too_that_have_not_begun(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/mlflow.db"
    command = [sys.executable, "-m", "pipelines", "run", "scaling", "--preset", "tiny", "--tracking-uri", store]
    command += ["--seeds", "0", "--set", "train_world.steps=1000000"]  # its cells share a tokenizer
    process = subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    client = MlflowClient(store)

    def trainings() -> list[Run]:
        known = client.search_experiments(filter_string="name = 'genie'")
        return client.search_runs([one.experiment_id for one in known], "tags.`genie.step` = 'train-world'")

    try:
        while process.poll() is None and not any(run.data.metrics for run in trainings()):
            time.sleep(0.5)
        process.terminate()  # as Ctrl-C; a shell that runs the tests behind has that ignored
        output, problems = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 130, output + problems
    assert "stopped; the same command carries on" in problems
    assert "[report]" not in output
    assert "KILLED" in {run.info.status for run in trainings()}


def test_a_world_that_is_not_there_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # for MLflow's files
    where = {"root_uri": "here", "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db", "experiment": "genie"}
    with pytest.raises(SystemExit):
        find_world.python_func(preset="tiny", overrides=[], **where, model_uri="nowhere", study={"name": "cloning"})
    assert "[find-world] error: no model at nowhere" in capsys.readouterr().err


def test_cloning_runs_on_a_trained_world_and_is_reported(command: Command, tmp_path: Path, tiny_model_uri: str) -> None:
    store = ["--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    asked = ["run", "cloning", "--preset", "tiny", "--variant", "easy", "--seeds", "0", "--state", "state"]
    done = command(*asked, "--model", tiny_model_uri, *store)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train-world" not in done.stdout
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("genie")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (study,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    (cell,) = (run for run in runs if "variant" in run.data.tags)
    assert [cell.data.tags[name] for name in ("variant", "seed", "preset")] == ["easy", "0", "tiny"]
    assert cell.data.tags["mlflow.parentRunId"] == study.info.run_id
    assert {"solved_latent_0", "solved_latent_20", "solved_oracle", "solved_expert"} <= set(cell.data.metrics)
    steps = {run.info.run_name for run in runs if run.data.tags.get("mlflow.parentRunId") == cell.info.run_id}
    assert steps == {"demonstrate", "train-policy-latent", "train-policy-oracle", "evaluate-policies"}
    assert {file.path for file in client.list_artifacts(study.info.run_id)} >= {"report.md", "curve.png"}
    assert "8 policy steps of 2 clips" in study.data.tags["mlflow.note.content"]
