"""What several rooms' tests start from: a tiny data set, and the Genie that a tiny run trains on it."""

from __future__ import annotations

import pytest

from genie_model.checkpoint import load_model
from genie_model.data.coinrun import collect
from genie_model.data.held_out import HeldOut
from genie_model.evaluate import save_start_frames
from genie_model.presets import get_preset
from genie_model.train import train_tokenizer, train_world


@pytest.fixture(scope="session")
def tiny_data_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return collect(get_preset("tiny"), str(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def tiny_model_uri(tiny_data_uri: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the pipeline's first four steps leave: config.json, model.safetensors, start_frames/*.png."""
    config, root = get_preset("tiny"), str(tmp_path_factory.mktemp("trained"))
    model_uri = train_world(config, tiny_data_uri, train_tokenizer(config, tiny_data_uri, root), root)
    save_start_frames(model_uri, HeldOut.open(f"{tiny_data_uri}/eval", config.evaluation.clips), load_model(model_uri))
    return model_uri
