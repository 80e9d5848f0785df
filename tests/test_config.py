from __future__ import annotations

import json

import pytest

from genie_model.config import Config
from genie_model.presets import get_preset, preset_names


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_survives_json(name: str) -> None:
    config = get_preset(name)
    assert config.name == name
    assert Config.from_json(config.to_json()) == config


def test_overrides_change_their_leaf_and_nothing_else() -> None:
    config = get_preset("tiny").with_overrides("tokenizer.codebook.num_codes=32", "train_world.precision=fp32")
    before, after = get_preset("tiny").flat(), config.flat()
    changed = {name: value for name, value in after.items() if before[name] != value}
    assert changed == {"tokenizer.codebook.num_codes": 32, "train_world.precision": "fp32"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tokenizer.codebok.num_codes=3", "did you mean 'tokenizer.codebook.num_codes'"),
        ("train_wolrd.steps=3", "did you mean 'train_world.steps'"),
        ("tokenizer=3", "unknown config field 'tokenizer'"),
        ("train_world.steps", "not of the form name=value"),
        ("train_world.steps=none", "train_world.steps"),
        ("lam.inputs=tokens", "set lam.predict=frame, lam.motion_rows=0 and lam.motion_columns=0 too"),
        ("train_world.optimizer.beta1=7", "less than 1"),
        ("train_world.optimizer.min_lr=7", "min_lr=7 is above max_lr=0.003"),
        ("train_world.precision=fp8", "'bf16' or 'fp32'"),
        ("tokenizer.patch_size=65", "tokenizer.patch_size=65 is larger than the frame: at most 64"),
    ],
)
def test_a_wrong_override_says_what_is_wrong(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as raised:
        get_preset("tiny").with_overrides(override)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_unknown_preset_offers_the_closest() -> None:
    with pytest.raises(ValueError, match="did you mean 'coinrun'"):
        get_preset("conrun")


def test_unknown_fields_of_a_config_are_refused() -> None:
    tree = json.loads(get_preset("tiny").to_json())
    tree["tokenizer"]["codebook_size"] = 4
    with pytest.raises(ValueError, match=r"tokenizer\.codebook_size"):
        Config.from_json(json.dumps(tree))


def test_a_digest_follows_its_parts_alone() -> None:
    config = get_preset("tiny")
    longer = config.with_overrides("train_world.steps=9")
    assert longer.digest() != config.digest()
    assert longer.digest("data", "tokenizer") == config.digest("data", "tokenizer")
