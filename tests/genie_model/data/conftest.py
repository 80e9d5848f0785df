import shutil

import pytest

from genie_model.data.coinrun import collect
from genie_model.presets import get_preset


@pytest.fixture(scope="session")
def recording_config():
    """Long enough that agents die, with shards that the levels do not fill evenly."""
    return get_preset("tiny").with_overrides(
        "data.train_levels=12", "data.levels_per_shard=5", "data.steps_per_level=400", "data.eval_steps_per_level=100"
    )


@pytest.fixture(scope="session")
def recorded(recording_config, tmp_path_factory):
    """URI of a finished data set. Do not change it: take `copied`."""
    return collect(recording_config, str(tmp_path_factory.mktemp("recorded")))


@pytest.fixture
def copied(recorded, tmp_path):
    """A data set to break: (root URI for collect, the data set's folder)."""
    folder = tmp_path / "datasets" / recorded.rsplit("/", 1)[-1]
    shutil.copytree(recorded, folder)
    return str(tmp_path), folder
