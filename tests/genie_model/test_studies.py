"""Variants differ in what they compare and in nothing else; tables and fits say what was measured."""

from __future__ import annotations

import math

import pytest

import pipelines.local
from genie_model.comparison import PowerLaw, Spread, compare
from genie_model.presets import get_preset
from genie_model.studies import STUDIES, cells, study, tokenizer_parameters


def changed(name: str, preset: str = "demo") -> dict[str, set[str]]:
    """Of every variant the fields in which it differs from the preset."""
    base = get_preset(preset)
    variants = {cell.variant: base.with_overrides(*cell.overrides).flat() for cell in cells(name, preset, [], [0])}
    return {v: {field for field, value in flat.items() if value != base.flat()[field]} for v, flat in variants.items()}


def test_lam_inputs_differ_in_the_input_alone() -> None:
    found = changed("lam_inputs")
    assert found["tokens"] - found["pixels"] == {"lam.inputs"}
    assert found["pixels, as demo has it"] == set()
    assert set(changed("lam_inputs", "coinrun")) == {"pixels", "tokens"}, "coinrun's LAM is the paper's already"
    tokens = cells("lam_inputs", "coinrun", ["lam.inputs=tokens"], [0])
    assert [cell.variant for cell in tokens] == ["pixels", "tokens"], "and one of the two by itself"


@pytest.mark.parametrize(("preset", "patch"), [("demo", 8), ("coinrun", 8), ("platformers_41m", 10)])
def test_tokenizers_have_one_size_and_the_paper_s_patch_where_it_fits(preset: str, patch: int) -> None:
    base = get_preset(preset)
    configs = {cell.variant: base.with_overrides(*cell.overrides) for cell in cells("tokenizers", preset, [], [0])}
    assert [config.tokenizer.architecture for config in configs.values()] == ["vit", "c_vivit", "st_vivit"]
    assert {config.tokenizer.patch_size for config in configs.values()} == {patch}
    sizes = [tokenizer_parameters(config) for config in configs.values()]
    assert max(sizes) <= 1.03 * sizes[-1]
    assert min(sizes) >= 0.97 * sizes[-1]
    allowed = {
        "tokenizer.architecture",
        "tokenizer.patch_size",
        "tokenizer.encoder.d_model",
        "tokenizer.decoder.d_model",
    }
    assert all(fields <= allowed for fields in changed("tokenizers", preset).values())


def test_scaling_has_sizes_and_batches_and_the_paper_s_rungs_at_its_preset() -> None:
    found = changed("scaling")
    assert {v for v in found if v.startswith("width")} == {f"width {width}, batch 4" for width in (32, 64, 128, 256)}
    assert found["batch 2, width 128"] == {"train_world.batch_size"}
    rungs = [cell.variant for cell in cells("scaling", "platformers_41m", [], [0])]
    assert rungs[:2] == ["size 41m", "size 96m"]
    assert rungs[-1] == "batch 448"


def test_cloning_is_in_both_modes() -> None:
    assert changed("cloning") == {"easy": {"cloning.mode"}, "hard": set()}


def test_a_curve_s_points_are_columns_in_order_and_a_plot() -> None:
    found = {
        mode: [{f"solved_latent_{n}": 0.3 + n / 1000 + seed / 100 for n in (0, 200, 50)} | {"solved_oracle": 0.5}]
        for mode, seed in (("easy", 0), ("hard", 1))
    }
    made = compare(study("cloning"), found)
    assert made.table[0] == ("", "seeds", "oracle", *(f"LAM-based policy, {n} labels" for n in (0, 50, 200)))
    assert made.table[1] == ("easy", "1", "0.5", "0.3", "0.35", "0.5")
    assert "200 expert samples" in made.markdown()
    assert set(made.pictures) == {"comparison", "curve"}


def test_curation_differs_in_the_rule_alone() -> None:
    assert changed("curation") == {"original": {"curation.threshold"}, "curated": set()}
    with pytest.raises(ValueError, match="keep every clip"):
        cells("curation", "demo", ["curation.threshold=0"], [0])


def test_cells_are_every_variant_with_every_seed_and_can_be_chosen() -> None:
    found = cells("tokenizers", "tiny", ["train_world.steps=3"], [5, 7, 5], ["vit"])
    assert [(cell.variant, cell.seed) for cell in found] == [("vit", 5), ("vit", 7)]
    config = get_preset("tiny").with_overrides(*found[1].overrides)
    assert (config.seed, config.train_world.steps, config.tokenizer.architecture) == (7, 3, "vit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tokenisers", "tiny", [], [0]), "did you mean 'tokenizers'"),
        (("tokenizers", "tinny", [], [0]), "did you mean 'tiny'"),
        (("tokenizers", "tiny", [], []), "seeds"),
        (("tokenizers", "tiny", [], [0], ["vitt"]), "did you mean 'vit'"),
        (("tokenizers", "tiny", ["train_world.step=3"], [0]), "train_world.steps"),
    ],
)
def test_what_there_is_not_is_named(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cells(*arguments)  # type: ignore[arg-type]


def test_a_spread_is_student_s() -> None:
    assert Spread.of([1.0, 2.0, 3.0]).ci95 == pytest.approx(2.484, abs=1e-3)  # t = 4.303, s = 1, n = 3
    assert math.isnan(Spread.of([1.0]).ci95)
    assert [str(Spread.of(values)) for values in ([1.0], [2.0, 2.0], [1.0, 2.0, 3.0])] == ["1", "2", "2 ± 2.5"]


def test_a_power_law_is_found_and_its_interval_holds_it() -> None:
    x = [1e9, 1e10, 1e11, 1e12]
    law = PowerLaw.fitted(x, [3 * one**-0.1 * noise for one, noise in zip(x, (1.02, 0.99, 1.01, 0.98), strict=True)])
    assert law.factor == pytest.approx(3, rel=0.2)
    assert abs(law.exponent + 0.1) < law.ci95 < 0.1
    with pytest.raises(ValueError, match="two sizes"):
        PowerLaw.fitted([1e9, 1e9], [1, 2])


def test_a_comparison_shows_what_was_measured_beside_the_paper() -> None:
    found = {
        f"width {width}": [
            {"flops_dynamics": width**2, "final_dynamics_cross_entropy": width**-0.2 + seed / 100} for seed in (0, 1)
        ]
        for width in (32, 64, 128)
    }
    asked = {"width 32": 3, "width 64": 2, "batch 1": 2}
    made = compare(study("scaling"), {**found, "batch 1": []}, ["a note"], asked)
    assert [row[:2] for row in made.table[1:]] == [
        ("width 32", "2 of 3"), ("width 64", "2"), ("width 128", "2"), ("batch 1", "0 of 2")
    ]  # fmt: skip
    assert made.table[-1][2:] == ("-", "-")
    assert made.table[0] == ("", "seeds", "dynamics' training FLOPs", "final training loss")
    text = made.markdown()
    assert "- a note" in text
    assert "x^-0.0" in text
    assert "6 runs of 3 sizes" in text
    assert "| size 2.7b | 2.7B | 6.91e+21 |" in text
    assert made.html().count("data:image/png;base64,") == 2
    with pytest.raises(ValueError, match="no cell"):
        compare(STUDIES["scaling"], {"batch 1": []})
    without = compare(study("scaling"), {"width 32": [{"flops_dynamics": 1.0}], "width 64": [{"flops_dynamics": 2.0}]})
    assert set(without.pictures) == {"comparison"}, "no loss, no law"


def test_a_law_says_what_its_interval_is_of() -> None:
    assert str(PowerLaw(2.0, -0.5, 0.1)) == "y = 2 x^-0.5, of exponent -0.5 (its 95% interval: ± 0.1)"
    assert "±" not in str(PowerLaw.fitted([1.0, 10.0], [2.0, 1.0])), "two points leave none"


def test_every_study_is_a_pipeline() -> None:
    assert set(STUDIES) == set(pipelines.local.STUDIES), "which may not import what this needs"
