"""`python -m genie_model`: its stages, alone and in two processes, and what it says of what is wrong."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from curation_help import write_true_labels, write_videos

from genie_model.__main__ import main
from genie_model.checkpoint import load_model, load_tokenizer
from genie_model.data.store import VideoStore
from genie_model.tracking import connect

SHORT = ["--set", "train_tokenizer.steps=4", "--set", "train_tokenizer.optimizer.muon_lr=0"]
SHORT += ["--set", "train_tokenizer.precision=fp32", "--set", "train_world.steps=2"]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*arguments, *SHORT]) == 0
    return capsys.readouterr().out.splitlines()[-1]


def test_the_stages_one_by_one(
    tiny_data_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a database of its own has its artifacts in ./mlruns
    store = f"sqlite:///{tmp_path}/mlflow.db"
    where = ["tiny", "--data", tiny_data_uri, "--root", str(tmp_path)]
    tokenizer_uri = printed(capsys, "train-tokenizer", *where, "--result", str(tmp_path / "made" / "uri"))
    assert (tmp_path / "made" / "uri").read_text() == tokenizer_uri
    of_pipeline = ["--tracking-uri", store, "--result", str(tmp_path / "uri")]
    model_uri = printed(capsys, "train-world", *where, "--tokenizer", tokenizer_uri, *of_pipeline)
    assert load_model(model_uri).config.train_world.steps == 2
    client = connect(store)
    (experiment,) = client.search_experiments(filter_string="name = 'genie'")
    (run,) = client.search_runs([experiment.experiment_id], "attributes.run_name = 'train-world'")
    assert run.info.status == "FINISHED"
    assert run.data.metrics["loss"] > 0
    pipeline = client.get_run(run.data.tags["mlflow.parentRunId"])
    assert pipeline.info.status == "RUNNING", "whoever wanted the result goes on"
    assert model_uri in pipeline.data.tags.values()


def test_curation_step_by_step_and_scores_in_shares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_uri = write_videos(f"{tmp_path}/videos", range(6), clips=2)
    labels_uri = write_true_labels(f"{tmp_path}/labels.json", data_uri)
    where = ["tiny", "--root", str(tmp_path), "--data", data_uri, "--set", "curation.width=8"]
    where += ["--set", "curation.steps=20", "--set", "curation.frames=2", "--set", "curation.batch_size=8"]
    classifier_uri = printed(capsys, "train-curator", *where, "--labels", labels_uri)
    for share in ("1/2", "0/2"):
        scores_uri = printed(capsys, "score", *where, "--classifier", classifier_uri, "--share", share)
    curated_uri = printed(capsys, "curate", *where, "--scores", scores_uri, "--set", "curation.threshold=0.01")
    assert 1 <= VideoStore.open(f"{curated_uri}/train").num_episodes <= 12
    with pytest.raises(SystemExit):
        main(["score", *where, "--classifier", classifier_uri, "--share", "2/2"])
    assert "'2/2' is no share" in capsys.readouterr().err


def test_two_processes_make_the_model_of_one(
    tiny_data_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = printed(capsys, "train-tokenizer", "tiny", "--data", tiny_data_uri, "--root", str(tmp_path / "alone"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "genie_model", "train-tokenizer", "tiny", "--data", tiny_data_uri, "--root", str(tmp_path / "two")]
    run = subprocess.run(
        [*torchrun, *command, *SHORT, "--set", "parallel.fsdp=2"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (together,) = [line for line in run.stdout.splitlines() if line.startswith(str(tmp_path))]
    assert Path(together).name == Path(alone).name  # how the work is shared decides nothing
    one, two = (load_tokenizer(uri).state_dict() for uri in (alone, together))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train-tokenizer", "tinny", "--data", "x", "--root", "y"], "tiny"),
        (["train-tokenizer", "tiny", "--data", "nowhere", "--root", "y"], "nowhere"),
        (["collect", "tiny", "--root", "y", "--set", "data.train_level=1"], "train_levels"),
        (["train-tokenizer", "tiny", "--data", "DATA", "--root", "y", "--set", "parallel.fsdp=2"], "there are 1"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], said: str, tiny_data_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"DATA": tiny_data_uri, "y": str(tmp_path)}
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("genie_model: ")
    assert said in error
    assert len(error.splitlines()) == 1


def test_a_store_that_fails_is_one_line(tiny_data_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 1: it may work another time."""
    (tmp_path / "file").touch()
    where = ["tiny", "--data", tiny_data_uri, "--root", str(tmp_path / "file")]
    assert main(["train-tokenizer", *where, *SHORT]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("genie_model: ")]
    assert "Not a directory" in line


def test_of_several_processes_the_first_alone_collects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["collect", "tiny", "--root", str(tmp_path), "--result", str(tmp_path / "uri")]) == 0
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(importlib.util.find_spec("torch_xla") is not None, reason="torch-xla is here")
def test_xla_without_torch_xla_is_one_line(
    tiny_data_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["tiny", "--data", tiny_data_uri, "--root", str(tmp_path)]
    assert main(["train-tokenizer", *where, "--set", "parallel.backend=xla"]) == 2
    assert capsys.readouterr().err == "genie_model: parallel.backend=xla needs torch-xla: pip install '.[tpu]'\n"
