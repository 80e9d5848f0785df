"""The benchmarks' own parts; their figures are not tested, since machines differ."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

import benchmarks.__main__
from benchmarks import choices, costs, long_session
from benchmarks.__main__ import Line
from benchmarks.choices import STUDIES, record, recorded, table
from benchmarks.configs import CONFIGS
from benchmarks.long_session import beside_real, played_before
from benchmarks.throttled import ThrottledFileSystem
from genie_model.checkpoint import load_model
from genie_model.data.held_out import HeldOut
from genie_model.presets import get_preset
from genie_model.tracking import connect


@pytest.mark.parametrize("study", STUDIES)
def test_every_variant_of_a_study_is_a_config_of_its_own(study):
    configs = [get_preset("demo").with_overrides(*overrides) for overrides in STUDIES[study].values()]
    assert len({config.digest() for config in configs}) == len(configs)
    trained = {config.model_copy(update={"sampling": configs[0].sampling}).digest() for config in configs}
    assert len(trained) == (1 if study == "sampling" else len(configs))


def test_the_table_has_means_and_half_the_range_over_seeds():
    runs = {"a": [{"delta_psnr_t4": 1.0, "fvd_random3d": 0.5}, {"delta_psnr_t4": 2.0, "fvd_random3d": 0.5}]}
    assert table(runs).splitlines()[-1] == "| a | 2 | 1.5 ± 0.5 | 0.5 ± 0 |"
    assert table({"a": [{"delta_psnr_t4": 1.0}]}).splitlines()[-1] == "| a | 1 | 1 |"


def test_of_each_variant_and_seed_the_newest_run_of_the_same_budget_counts(tmp_path):
    client = connect(f"sqlite:///{tmp_path}/runs.db")
    experiment = client.create_experiment("choices-lam", artifact_location=str(tmp_path))
    config = get_preset("tiny")
    for variant, budget, seed, value in [
        ("base", "short", 0, 1.0),
        ("base", "short", 1, 2.0),
        ("codes by gradient", "short", 0, 9.0),
        ("base", "long", 0, 7.0),
        ("base", "short", 0, 3.0),
    ]:
        record(client, experiment, variant, budget, config.with_overrides(f"seed={seed}"), {"delta_psnr_t4": value})
    found = recorded(client, experiment, "lam", "short")
    assert list(found) == ["base", "codes by gradient"]  # in the study's order, without what has no run
    assert sorted(run["delta_psnr_t4"] for run in found["base"]) == [2.0, 3.0]


def test_what_is_wrong_is_said_in_a_line_before_anything_is_written(
    tiny_model_uri, tiny_data_uri, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    missing = ["--data", str(tmp_path / "nothing"), "--root", str(tmp_path)]
    for program, arguments, said in [
        (choices, ["lam", *missing], "there is no data set"),
        (
            benchmarks.__main__,
            ["--set", "sampling.temprature=1", "--set", "seed=1"],
            "did you mean 'sampling.temperature'",
        ),
        (benchmarks.__main__, ["--only", "nosuch"], "nothing is called nosuch"),
        (long_session, [str(tmp_path / "nothing")], "no model at"),
        (long_session, [str(tmp_path), "--worlds", "0"], "at least 1"),
        (long_session, [tiny_model_uri, "--like", ""], "there is no data set at /eval"),
        (long_session, [tiny_model_uri, "--like", tiny_data_uri, "--worlds", "5", "--frames", "9"], "4 levels"),
        (long_session, [tiny_model_uri, "--like", tiny_data_uri, "--worlds", "4"], "ingest.eval_share of video"),
        (long_session, [tiny_model_uri, "--like", tiny_data_uri, "--worlds", "1", "--frames", "20"], "two clips"),
        (
            long_session,
            [tiny_model_uri, "--like", tiny_data_uri, "--worlds", "2", "--frames", "9", "--out", "/dev/null/out/a"],
            "Not a directory",
        ),
    ]:
        monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
        with pytest.raises(SystemExit) as stopped:
            program.main()
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_long_session_is_played_as_it_really_was(tiny_model_uri, tiny_data_uri, tmp_path, monkeypatch):
    command = ["long_session", tiny_model_uri, "--like", tiny_data_uri, "--worlds", "2", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [*command, "--frames", "30"])
    long_session.main()
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["worlds"], found["frames"], [*found["detail_over_prompt"]]) == (2, 30, ["0", "1", "16"])
    assert Image.open(tmp_path / "out.png").height > 4 * 64  # of each world the real frames and the dreamt ones

    genie, held_out = load_model(tiny_model_uri), HeldOut.open(f"{tiny_data_uri}/eval", 8)
    real, actions_BT = played_before(genie, held_out, 2, 30)
    longest = max(len(episode.frames_THWC) for episode in held_out.episodes)
    assert len(real[0]) == longest < 31  # so that its actions do not suffice
    first = genie.infer_actions(torch.from_numpy(real[0][None, : genie.config.data.clip_length].copy()))[0]
    assert actions_BT[0, : len(first)].tolist() == first.tolist()
    assert actions_BT.shape == (2, 30)
    ends = {15: np.stack([frames_THWC[:16] for frames_THWC in real])}
    monkeypatch.setattr(long_session, "_LAST", 16)
    looks = beside_real(real, ends)[15]
    assert all(looks[name] == looks[f"{name}_of_real"] for name in ("fvd_random3d", "detail", "motion"))
    assert looks["motion"] > 0
    frozen = beside_real(real, {15: np.repeat(ends[15][:, :1], 16, 1)})[15]
    assert frozen["motion"] == 0
    assert frozen["fvd_random3d"] > frozen["fvd_random3d_of_real"]


def test_the_cost_of_a_preset_is_its_flops_at_the_price_that_is_given(capsys):
    costs.main(["tiny", "--share", "0.5", "--price", "v5p=3600"])
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    row = dict(zip((title.strip("| ") for title in table[0]), (cell.strip("| ") for cell in table[2]), strict=True))
    assert row["preset"] == "`tiny`"
    hours = float(row["v5p, chip-hours"])
    assert 0 < hours < 1e-3
    assert float(row["v5p, $"]) == pytest.approx(3600 * hours, rel=0.1)
    for wrong in ("v5p", "v9=1", "v5p=dear"):
        with pytest.raises(SystemExit):
            costs.main(["tiny", "--price", wrong])


def test_a_line_s_share_is_the_floor_s_part_of_the_time():
    line = Line("demo", "step", 8.0, 2.0, 3, 1e9, 1e9, 3e9)
    assert (line.floor, line.share) == (0.5, 0.25)


def test_the_case_study_is_the_work_that_peers_do():
    config = CONFIGS["case study"]()
    assert config.tokenizer.encoder.num_layers == config.tokenizer.decoder.num_layers == 2 * 8
    assert config.dynamics.transformer.num_layers == 2 * 12
    assert (config.data.frame_height // config.tokenizer.patch_size) ** 2 == 256
    assert config.num_actions == 6


def test_the_throttled_store_is_no_faster_than_it_says(monkeypatch):
    monkeypatch.setattr(ThrottledFileSystem, "latency", 0.1)
    monkeypatch.setattr(ThrottledFileSystem, "bandwidth", 1e6)
    store = fsspec.filesystem("throttled")
    store.pipe_file("throttled://speed/file", bytes(100_000))
    ThrottledFileSystem.reads.clear()
    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:  # side by side: they wait together, but share the line
        parts = pool.map(lambda start: store.cat_file("throttled://speed/file", start, start + 50_000), [0, 50_000])
        assert b"".join(parts) == bytes(100_000)
    assert time.monotonic() - began >= 0.2
    assert sorted(ThrottledFileSystem.reads) == [("throttled://speed/file", start, 50_000) for start in (0, 50_000)]
    store.rm("throttled://speed", recursive=True)
