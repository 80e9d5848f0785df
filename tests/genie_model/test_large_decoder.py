"""The larger decoder: it learns larger frames of the same tokens, and streams them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from genie_model import checkpoint, train
from genie_model.__main__ import main
from genie_model.config import TransformerConfig
from genie_model.data.coinrun import collect
from genie_model.data.store import VideoStore
from genie_model.enlarging import _CODE, Enlarging, enlarge, shrink, train_large_decoder
from genie_model.genie import to_uint8
from genie_model.large_decoder import LargeDecoder, check_fits, load_large_decoder
from genie_model.layers import TemporalCache
from genie_model.presets import get_preset
from genie_model.tokenizer import VideoTokenizer

CONFIG = get_preset("tiny")
LARGER = CONFIG.with_overrides("data.frame_height=128", "data.frame_width=128")


@pytest.fixture(scope="module")
def larger_data_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return collect(LARGER, str(tmp_path_factory.mktemp("larger")))


@pytest.fixture(scope="module")
def decoder_uri(larger_data_uri: str, tiny_model_uri: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_large_decoder(CONFIG, larger_data_uri, tiny_model_uri, str(tmp_path_factory.mktemp("decoder")))


def test_larger_frames_are_the_small_ones_seen_closer(larger_data_uri: str, tiny_data_uri: str) -> None:
    small, large = (VideoStore.open(f"{uri}/train").frames(0, 0, 8) / 255 for uri in (tiny_data_uri, larger_data_uri))
    seen = shrink(torch.from_numpy(large)[None], 2)[0].numpy()
    assert np.square(seen - small).mean() < 0.1 * small.var()
    assert np.square(seen[1:] - small[:-1]).mean() > np.square(seen - small).mean()


def test_it_is_trained_measured_and_reused(
    decoder_uri: str, larger_data_uri: str, tiny_model_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = checkpoint.load_training(decoder_uri)
    assert figures["large_psnr_gain"] == pytest.approx(figures["large_psnr"] - figures["large_psnr_bicubic"])
    assert figures["large_psnr_gain_ci95"] > 0
    assert figures.keys() >= {"final_large_psnr"}
    assert "final_psnr" not in figures, "the tokenizer's"
    root = decoder_uri.rpartition("/models/")[0]
    assert train_large_decoder(CONFIG, larger_data_uri, tiny_model_uri, root) == decoder_uri
    assert "reused" in capsys.readouterr().out
    longer = CONFIG.with_overrides("train_large_decoder.steps=9")
    assert train_large_decoder(longer, larger_data_uri, tiny_model_uri, root) != decoder_uri


def test_its_folder_holds_it_alone_and_the_tokenizer_is_as_it_was(decoder_uri: str, tiny_model_uri: str) -> None:
    genie = checkpoint.load_model(tiny_model_uri)
    decoder = load_large_decoder(decoder_uri, genie)
    assert sorted(path.name for path in Path(decoder_uri).iterdir()) == [
        "config.json",
        "model.safetensors",
        "training.json",
    ]
    assert not any(name.startswith("encoder") for name in decoder.state_dict())
    assert torch.equal(decoder.codebook_VL, genie.tokenizer.quantizer.codebook_VL)
    assert not torch.equal(decoder.decoder_position, genie.tokenizer.decoder_position)


def test_streamed_frames_are_those_of_the_whole_clip(decoder_uri: str, tiny_model_uri: str) -> None:
    decoder = load_large_decoder(decoder_uri, checkpoint.load_model(tiny_model_uri))
    decoder.precision = "fp32"
    codes_BTNC = torch.randint(16, (2, 20, 16, 4), generator=torch.Generator().manual_seed(0))  # past the window of 8
    with torch.no_grad():
        whole = decoder(codes_BTNC)
    streamed = torch.stack(list(decoder.painting(codes_BTNC, TemporalCache())), 1)
    assert streamed.shape == (2, 20, 128, 128, 3)
    assert (streamed.int() - to_uint8(whole).int()).abs().max() <= 1

    # A second pass that begins in the middle knows all that matters after `picture_memory` frames.
    later = list(decoder.painting(codes_BTNC[:1, 5:], TemporalCache([5])))
    assert decoder.picture_memory == 8
    assert torch.equal(later[-1], streamed[:1, -1])
    assert not torch.equal(later[0], streamed[:1, 5])


@pytest.mark.parametrize("codes_per_patch", [1, 4])
def test_it_begins_as_the_small_decoder_enlarged(codes_per_patch: int) -> None:
    config = CONFIG.with_overrides(f"tokenizer.codes_per_patch={codes_per_patch}")
    torch.manual_seed(0)
    tokenizer = VideoTokenizer(config.tokenizer, 64, 64, 8).eval()
    decoder = Enlarging(config, tokenizer).decoder.eval()
    codes_BTNC = torch.randint(16, (1, 3, 16, codes_per_patch))
    with torch.no_grad():
        small = tokenizer.decode_latents(tokenizer.quantizer.embed(codes_BTNC))
        large = decoder.decode(codes_BTNC)
    # The seams of patches aside: there a picture's own enlargement looks at both sides.
    inner = torch.ones(128, dtype=torch.bool)
    for seam in range(0, 129, 32 if codes_per_patch == 1 else 16):
        inner[max(seam - 4, 0) : seam + 4] = False
    difference = (large - enlarge(small, 2))[:, :, inner][:, :, :, inner]
    assert difference.abs().max() < 1e-4 * small.abs().max()
    assert small.std() > 0.05

    other = TransformerConfig(num_layers=1, d_model=16, num_heads=1, head_dim=16).model_dump_json()
    config = config.with_overrides(f"large_decoder.transformer={other}")
    assert Enlarging(config, tokenizer).decoder(codes_BTNC).shape == large.shape


def test_frames_that_are_no_multiple_of_the_patch() -> None:
    size = ("data.frame_height=90", "data.frame_width=160", "tokenizer.patch_size=4", "large_decoder.scale=4")
    decoder = LargeDecoder(CONFIG.with_overrides(*size))
    assert decoder.grid.patch == 16
    assert decoder.num_patches == 40 * 23
    assert decoder(torch.zeros(1, 1, 40 * 23, 4, dtype=torch.long)).shape == (1, 1, 360, 640, 3)


def test_what_does_not_fit_is_refused(
    decoder_uri: str, larger_data_uri: str, tiny_data_uri: str, tiny_model_uri: str, tmp_path: Path
) -> None:
    root = str(tmp_path)
    with pytest.raises(ValueError, match=r"are 64x64, and the larger decoder's 128x128, 2 times the tokenizer's"):
        train_large_decoder(CONFIG, tiny_data_uri, tiny_model_uri, root)
    other = CONFIG.with_overrides("tokenizer.codebook.num_codes=8")
    with pytest.raises(ValueError, match="trained with another tokenizer config or frame size"):
        train_large_decoder(other, larger_data_uri, tiny_model_uri, root)
    with pytest.raises(ValueError, match="no model at"):
        train_large_decoder(CONFIG, larger_data_uri, f"{root}/nowhere", root)
    genie = checkpoint.load_model(tiny_model_uri)
    genie.tokenizer.quantizer.codebook_VL += 1
    with pytest.raises(ValueError, match="was trained on another tokenizer"):
        load_large_decoder(decoder_uri, genie)
    model = tmp_path / "genie"
    shutil.copytree(tiny_model_uri, model)
    shutil.copytree(decoder_uri, model / "large_decoder")
    check_fits(model)
    checkpoint.save_model(str(model), genie)
    with pytest.raises(ValueError, match="was trained on another tokenizer"):
        check_fits(model)
    broken = tmp_path / "broken"
    shutil.copytree(decoder_uri, broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="are broken"):
        load_large_decoder(str(broken), genie)


def test_the_command_trains_it(
    larger_data_uri: str, tiny_model_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train-decoder", "tiny", "--data", larger_data_uri, "--root", str(tmp_path)]
    command += ["--tokenizer", tiny_model_uri, "--set", "train_large_decoder.steps=1"]
    assert main(command) == 0
    uri = capsys.readouterr().out.splitlines()[-1]
    assert checkpoint.is_model(uri)
    assert uri.startswith(f"{tmp_path}/models/large-decoder-")


def test_all_code_that_decides_its_weights_is_named() -> None:
    assert set(train.TRAINER_CODE) | {"enlarging.py", "large_decoder.py", "quantizer.py", "tokenizer.py"} == set(_CODE)
