"""A study in a real MLflow store (SQLite): its cells nest, compare, fail alone and are added to."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from genie_model.checkpoint import save_training
from genie_model.presets import get_preset
from genie_model.tracking import newest_study, plan, record_report, report, step
from genie_model.tracking.studies import UnfinishedStudyError

WHERE = {"root_uri": "here", "tracking_uri": "", "experiment": "studies"}


@pytest.fixture(autouse=True)
def client(tmp_path: Path) -> Iterator[MlflowClient]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
        patch.delenv("MLFLOW_RUN_ID", raising=False)
        yield MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")


def planned(seeds: list[int], distinct: Sequence[str] = ()) -> list[dict[str, Any]]:
    with step("plan", "tiny", **WHERE, study={"name": "lam_inputs"}) as run:
        return plan("lam_inputs", "tiny", [], seeds, ["pixels", "tokens"], distinct, "data", run)


def run_cell(cell: dict[str, Any], delta_psnr: float | None) -> None:
    """As the components do; None: training fails."""
    where = {**WHERE, "study": cell["study"]}
    with step("train-world", "tiny", cell["overrides"], **where) as run:
        if delta_psnr is None:
            raise ValueError("the loss is nan")
        uri = f"models/{cell['overrides'][-1]}"
        save_training(uri, {"final_dynamics_cross_entropy": 1.5, "peak_memory_mb_train_world": 700.0})
        run.made("world", uri)
    with step("evaluate", "tiny", cell["overrides"], **where, ends_pipeline=True) as run:
        run.result({"delta_psnr_t4": delta_psnr or 0.0})


def reported() -> str:
    """As the component does it."""
    with step("report", "tiny", **WHERE, study={"name": "lam_inputs"}, ends_pipeline=True) as run:
        found = record_report("lam_inputs", run)
        found.check()
    return found.comparison.markdown()


def test_a_study_says_what_it_is_measured_on_and_its_cells_what_that_was(tiny_data_uri: str) -> None:
    with step("plan", "tiny", **WHERE, study={"name": "lam_inputs"}) as run:
        (cell,) = plan("lam_inputs", "tiny", [], [0], ["pixels"], [], "data", run, eval_uri=tiny_data_uri)
    with step("evaluate", "tiny", cell["overrides"], **WHERE, study=cell["study"], ends_pipeline=True) as run:
        run.dataset(tiny_data_uri, splits=("eval",), expected=cell["eval_digest"])
        run.result({"delta_psnr_t4": 1.0})
    assert f"- Measured on {tiny_data_uri}/eval.\n" in reported()
    (unnamed,) = planned([0], distinct=["data"])
    assert unnamed["eval_digest"] == ""


def test_cells_nest_below_their_study_and_carry_what_they_are_compared_by(client: MlflowClient) -> None:
    for cell, value in zip(planned([0, 1]), (1.0, 2.0, 3.0, 4.0), strict=True):
        run_cell(cell, value)
    text = reported()
    assert "| pixels | 2 | " in text
    assert "2 ± 13" in text, "pixels: 1 and 3"
    study_id = newest_study("lam_inputs", client, "studies")
    cells = client.search_runs([client.get_run(study_id).info.experiment_id], "tags.variant != ''")
    assert {(run.data.tags["variant"], run.data.tags["seed"]) for run in cells} == {
        (variant, seed) for variant in ("pixels", "tokens") for seed in "01"
    }
    for run in cells:
        assert run.data.tags["mlflow.parentRunId"] == study_id
        assert run.data.tags["preset"] == "tiny"
        assert run.info.status == "FINISHED"
        assert run.data.metrics["final_dynamics_cross_entropy"] == 1.5
        assert run.data.metrics["parameters"] > run.data.metrics["parameters_dynamics"] > 0
        assert run.data.metrics["peak_memory_mb_train_world"] == 700
    assert client.get_run(study_id).info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(study_id)} >= {
        "report.html",
        "report.md",
        "model_card.md",
        "comparison.png",
    }
    again = report("lam_inputs", client, study_id)
    assert again.comparison.markdown() == text, "from MLflow alone"
    assert client.get_run(study_id).data.tags["mlflow.note.content"].startswith(text)


def test_the_card_tells_what_each_model_is_and_how_to_make_it_again(client: MlflowClient) -> None:
    overrides = ["train_world.steps=3", "cloning.labelled=[7]"]
    with step("plan", "tiny", overrides, **WHERE, study={"name": "lam_inputs"}) as run:
        asked = plan("lam_inputs", "tiny", overrides, [4], ["pixels"], [], "data", run)
    run_cell(asked[0], 1.0)
    card = report("lam_inputs", client, newest_study("lam_inputs", client, "studies")).card
    (model,) = (line for line in card.splitlines() if line.startswith("| pixels | 4 |"))
    assert "`models/seed=4`" in model
    assert "- world: 3 steps of " in card
    command = card.partition("```sh\n")[2].partition("\n```")[0]
    given = shlex.split(command)
    assert given[:7] == ["python", "-m", "pipelines", "run", "lam_inputs", "--preset", "tiny"]
    assert given[7:9] == ["--seeds", "4"]
    assert given[9:11] == ["--variant", "pixels"]
    same = get_preset("tiny").with_overrides(*given[12::2])
    assert same == get_preset("tiny").with_overrides(*overrides)


def test_one_cell_of_each_tokenizer() -> None:
    assert [
        (cell["study"]["variant"], cell["overrides"][-1])
        for cell in planned([0, 1], distinct=["data", "tokenizer", "train_tokenizer", "seed"])
    ] == [
        ("pixels", "seed=0"),
        ("pixels", "seed=1"),
    ]


def test_a_cell_that_fails_is_named_and_made_by_the_next_run(
    client: MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels, tokens = planned([0])
    run_cell(pixels, 1.0)
    with pytest.raises(SystemExit):
        run_cell(tokens, None)
    with pytest.raises(SystemExit):
        reported()
    assert "not finished: tokens, seed 0: failed" in capsys.readouterr().err
    study_id = newest_study("lam_inputs", client, "studies")
    assert client.get_run(study_id).info.status == "FAILED"
    kept = client.get_run(study_id).data.tags["mlflow.note.content"]
    assert "tokens, seed 0: failed" in kept
    assert "| pixels | 1 |" in kept
    assert "| tokens | 0 of 1 |" in kept
    assert report("lam_inputs", client, study_id).unfinished == ["tokens, seed 0: failed"]
    run_cell(planned([0])[1], 2.0)
    assert "| tokens | 1 |" in reported()
    more = planned([0, 1])
    run_cell(more[2], 3.0)
    assert newest_study("lam_inputs", client, "studies") == study_id, "seeds are added to the study that is there"
    assert report("lam_inputs", client, study_id).unfinished == ["tokens, seed 1: never started"]


def test_the_study_that_was_asked_for_last_is_reported(client: MlflowClient) -> None:
    planned([0])
    first = newest_study("lam_inputs", client, "studies")
    with step("plan", "tiny", ["train_world.steps=9"], **WHERE, study={"name": "lam_inputs"}) as run:
        plan("lam_inputs", "tiny", ["train_world.steps=9"], [0], [], [], "data", run)
    assert newest_study("lam_inputs", client, "studies") == run.parent_id != first
    planned([1])
    assert newest_study("lam_inputs", client, "studies") == first


def test_a_study_whose_runs_kubeflow_made_is_reported(client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = client.create_experiment("kubeflow")
    pipeline = client.create_run(experiment, run_name="pipeline").info.run_id

    def adopt(name: str) -> None:
        made = client.create_run(experiment, tags={"mlflow.parentRunId": pipeline}, run_name=name)
        monkeypatch.setenv("MLFLOW_RUN_ID", made.info.run_id)

    adopt("plan")
    (pixels, _) = planned([0])
    for name in ("train-world", "evaluate"):
        adopt(name)
        where = {**WHERE, "study": pixels["study"]}
        with step(name, "tiny", pixels["overrides"], **where, ends_pipeline=name == "evaluate") as run:
            run.result({"delta_psnr_t4": 1.0})
    assert newest_study("lam_inputs", client, "kubeflow") == pipeline
    found = report("lam_inputs", client, pipeline)
    assert found.unfinished == ["tokens, seed 0: never started"]
    with pytest.raises(ValueError, match="is no study 'scaling' but of 'lam_inputs'"):
        report("scaling", client, pipeline)


def test_a_cell_that_is_run_again_tells_the_code_that_ran_last(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pixels, _) = planned([0])
    for commit, delta_psnr in (("a" * 40, None), ("b" * 40, 1.0)):
        monkeypatch.setenv("GENIE_GIT_COMMIT", commit)
        if delta_psnr is None:
            with pytest.raises(SystemExit):
                run_cell(pixels, delta_psnr)
        else:
            run_cell(pixels, delta_psnr)
    study_id = newest_study("lam_inputs", client, "studies")
    assert "commit bbbbbbbb," in report("lam_inputs", client, study_id).card


def test_cells_that_were_measured_on_different_videos_are_said_to(client: MlflowClient) -> None:
    cells = planned([0])
    for cell in cells:
        run_cell(cell, 1.0)
    assert "do not compare" not in reported()
    study_id = cells[0]["study"]["run"]
    below = client.search_runs(
        [client.get_run(study_id).info.experiment_id], f"tags.`mlflow.parentRunId` = '{study_id}'"
    )
    for cell in (run for run in below if "variant" in run.data.tags):
        client.set_tag(cell.info.run_id, "dataset.eval.digest", cell.data.tags["variant"])
    assert "Cells were measured on different held-out videos, and do not compare" in reported()


def test_a_study_that_is_not_there_is_named(client: MlflowClient) -> None:
    with pytest.raises(ValueError, match="no experiment 'studies'"):
        newest_study("lam_inputs", client, "studies")
    planned([0])
    with pytest.raises(ValueError, match="run tokenizers"):
        newest_study("tokenizers", client, "studies")
    with pytest.raises(ValueError, match="did you mean"):
        newest_study("tokeniser", client, "studies")
    with pytest.raises(ValueError, match="pixels, seed 0: never started"):
        report("lam_inputs", client, newest_study("lam_inputs", client, "studies"))
    assert issubclass(UnfinishedStudyError, ValueError)


def test_runs_that_kubeflow_made_nest_below_their_cell(client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = client.create_experiment("kubeflow")
    pipeline = client.create_run(experiment, run_name="pipeline").info.run_id
    made = client.create_run(experiment, tags={"mlflow.parentRunId": pipeline}, run_name="train-world").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", made)
    where = {**WHERE, "study": {"name": "lam_inputs", "run": pipeline, "variant": "tokens"}}
    with step("train-world", "tiny", ["seed=4"], **where) as run:
        save_training("world", {"final_dynamics_cross_entropy": 2.0})
        run.made("world", "world")
    assert run.run_id == made
    cell = client.get_run(run.parent_id)
    assert client.get_run(made).data.tags["mlflow.parentRunId"] == cell.info.run_id
    assert cell.data.tags["mlflow.parentRunId"] == pipeline
    assert (cell.data.tags["variant"], cell.data.tags["seed"]) == ("tokens", "4")
    assert cell.data.metrics["final_dynamics_cross_entropy"] == 2.0
