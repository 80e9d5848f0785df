"""The benchmarks' own parts; their figures are not tested, since machines differ."""

import pytest

from benchmarks.__main__ import Line
from benchmarks.choices import STUDIES, record, recorded, table
from benchmarks.configs import CONFIGS
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


def test_of_each_variant_and_seed_the_newest_run_counts(tmp_path):
    client = connect(f"sqlite:///{tmp_path}/runs.db")
    experiment = client.create_experiment("choices-lam", artifact_location=str(tmp_path))
    config = get_preset("tiny")
    for variant, seed, value in [("demo", 0, 1.0), ("demo", 1, 2.0), ("patches of 16 pixels (paper)", 0, 9.0)]:
        record(client, experiment, "lam", variant, config.with_overrides(f"seed={seed}"), {"delta_psnr_t4": value})
    record(client, experiment, "lam", "demo", config, {"delta_psnr_t4": 3.0})
    found = recorded(client, experiment, "lam")
    assert list(found) == ["demo", "patches of 16 pixels (paper)"]  # in the study's order, without what has no run
    assert sorted(run["delta_psnr_t4"] for run in found["demo"]) == [2.0, 3.0]


def test_a_line_s_share_is_the_floor_s_part_of_the_time():
    line = Line("demo", "step", 8.0, 2.0, 3, 1e9, 1e9, 3e9)
    assert (line.floor, line.share) == (0.5, 0.25)


def test_the_case_study_is_the_work_that_peers_do():
    config = CONFIGS["case study"]()
    assert config.tokenizer.encoder.num_layers == config.tokenizer.decoder.num_layers == 2 * 8
    assert config.dynamics.transformer.num_layers == 2 * 12
    assert (config.data.frame_height // config.tokenizer.patch_size) ** 2 == 256
    assert config.num_actions == 6
