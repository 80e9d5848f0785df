"""Tokens computed once are those that training would compute, for every clip of the data set."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from genie_model.checkpoint import load_tokenizer
from genie_model.data import coinrun
from genie_model.data.loader import ClipLoader
from genie_model.data.store import VideoStore
from genie_model.presets import get_preset
from genie_model.tokens import tokens_of
from genie_model.train import train_tokenizer, train_world

CONFIG = get_preset("tiny").with_overrides("train_world.precision=fp32", "cached_tokens=true")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """URIs of the data, of a tokenizer, and the root of both."""
    root = str(tmp_path_factory.mktemp("tokens"))
    data_uri = coinrun.collect(CONFIG, root)
    return data_uri, train_tokenizer(CONFIG, data_uri, root), root


def test_they_are_what_the_tokenizer_makes_of_each_clip(trained: tuple[str, str, str]) -> None:
    data_uri, tokenizer_uri, root = trained
    store, tokenizer = VideoStore.open(f"{data_uri}/train"), load_tokenizer(tokenizer_uri)
    tokens = tokens_of(CONFIG, store, tokenizer, root)
    length = CONFIG.data.clip_length
    assert (tokens.episode_lengths == store.episode_lengths // length * length).all()
    loader = ClipLoader(store, 2, length, seed=0, tokens=tokens)
    assert all(start % length == 0 for _, start in loader.clips)
    same = []
    for step in range(len(loader.clips) // 2):
        batch = loader.batch(step)
        assert batch.codes_BTNC is not None
        with torch.inference_mode():
            expected_BTNC = tokenizer.encode(torch.from_numpy(batch.frames_BTHWC).float() / 255).numpy()
        same.append((batch.codes_BTNC == expected_BTNC).mean())
    assert np.mean(same) > 0.999  # near ties may fall otherwise in another batch


def test_an_interrupted_pass_carries_on_to_the_same_bytes(trained: tuple[str, str, str], tmp_path: Path) -> None:
    data_uri, tokenizer_uri, _ = trained
    store, tokenizer = VideoStore.open(f"{data_uri}/train"), load_tokenizer(tokenizer_uri)
    assert store.num_shards > 1
    whole = tokens_of(CONFIG, store, tokenizer, str(tmp_path))
    (folder,) = (tmp_path / "tokens").iterdir()
    for path in (folder / "index.json", folder / "shard-00001.json", folder / "shard-00001.tar"):
        path.unlink()
    kept = (folder / "shard-00000.tar").stat().st_mtime_ns
    again = tokens_of(CONFIG, store, tokenizer, str(tmp_path))
    assert again.digest == whole.digest
    assert (folder / "shard-00000.tar").stat().st_mtime_ns == kept


def test_another_tokenizer_at_the_same_place_has_tokens_of_its_own(trained: tuple[str, str, str]) -> None:
    data_uri, tokenizer_uri, root = trained
    store, tokenizer = VideoStore.open(f"{data_uri}/train"), load_tokenizer(tokenizer_uri)
    before = tokens_of(CONFIG, store, tokenizer, root)
    tokenizer.quantizer.codebook_VL.copy_(tokenizer.quantizer.codebook_VL.flip(0))
    after = tokens_of(CONFIG, store, tokenizer, root)
    assert after.uri != before.uri
    assert (_codes(after) == CONFIG.tokenizer.codebook.num_codes - 1 - _codes(before)).all()


def _codes(tokens: VideoStore) -> NDArray[np.int64]:
    batch = ClipLoader(tokens, 2, CONFIG.data.clip_length, seed=0, tokens=tokens).batch(0)
    assert batch.codes_BTNC is not None
    return batch.codes_BTNC


def test_damage_is_mended_or_says_what_to_do(trained: tuple[str, str, str], tmp_path: Path) -> None:
    data_uri, tokenizer_uri, _ = trained
    store, tokenizer = VideoStore.open(f"{data_uri}/train"), load_tokenizer(tokenizer_uri)
    whole = tokens_of(CONFIG, store, tokenizer, str(tmp_path))
    (folder,) = (tmp_path / "tokens").iterdir()
    (folder / "index.json").write_text("{")
    shard = (folder / "shard-00000.tar").read_bytes()
    (folder / "shard-00000.tar").write_bytes(shard[:-1])
    mended = tokens_of(CONFIG, store, tokenizer, str(tmp_path))
    assert (mended.digest, (folder / "shard-00000.tar").read_bytes()) == (whole.digest, shard)
    (folder / "shard-00000.tar").write_bytes(bytes(len(shard)))
    with pytest.raises(ValueError, match="is damaged: delete it and run train_world again"):
        mended.frames(0, 0, 8)


def test_the_world_trains_on_them(trained: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    data_uri, tokenizer_uri, root = trained
    tokens_of(CONFIG, VideoStore.open(f"{data_uri}/train"), load_tokenizer(tokenizer_uri), root)

    def never(*_: object) -> None:
        raise AssertionError("tokens were computed again")

    monkeypatch.setattr("genie_model.tokenizer.VideoTokenizer.encode", never)
    train_world(CONFIG, data_uri, tokenizer_uri, root)


def test_codes_that_two_bytes_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="cached_tokens: at most 65,536 codes"):
        CONFIG.with_overrides("tokenizer.codebook.num_codes=65537")
