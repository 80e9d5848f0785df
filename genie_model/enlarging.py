"""Training of the larger decoder (section 3.1) on the tokens of a frozen tokenizer, and how good it is."""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from numpy.typing import NDArray
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from genie_model import checkpoint, collectives, metrics, pictures
from genie_model.backend import native
from genie_model.chance import Chance
from genie_model.config import Config
from genie_model.data.loader import ClipLoader
from genie_model.data.store import VideoStore
from genie_model.large_decoder import LargeDecoder
from genie_model.progress import RunLog, bar, speaks, summary
from genie_model.tokenizer import VideoTokenizer
from genie_model.train import TRAINER_CODE, model_name, train_once

_CODE = (*TRAINER_CODE, "enlarging.py", "large_decoder.py", "quantizer.py", "tokenizer.py")


class Enlarging(nn.Module):
    """What is trained: larger clips, made small, become codes, of which the decoder makes the larger clips again."""

    def __init__(self, config: Config, tokenizer: VideoTokenizer) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer.requires_grad_(False)
        self.decoder = LargeDecoder(config)
        self.decoder.start_from(tokenizer)

    def forward(self, x_BTHWC: Tensor, chance: Chance | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of larger clips in [0, 1], and what to log. Nothing here is left to chance."""
        with torch.no_grad():
            codes_BTNC = self.tokenizer.encode(shrink(x_BTHWC, self.config.large_decoder.scale))
        error = F.mse_loss(self.decoder.decode(codes_BTNC), x_BTHWC)
        return error, {"large/mse": error.detach(), "large/psnr": -10 * collectives.mean(error.detach()).log10()}


def shrink(x_BTHWC: Tensor, scale: int) -> Tensor:
    """Each pixel the mean of scale x scale."""
    small: Tensor = reduce(x_BTHWC, "b t (h p) (w q) c -> b t h w c", "mean", p=scale, q=scale)
    return small


def train_large_decoder(
    config: Config, data_uri: str, tokenizer_uri: str, root_uri: str, log: RunLog | None = None
) -> str:
    """Learns the frames of `data_uri`/train from their tokens; returns the decoder's URI.

    Those frames are `large_decoder.scale` times as high and wide as the tokenizer's, which lies at `tokenizer_uri`
    alone or within a Genie. As in `train`, a finished decoder is reused and a killed run carries on. Once it is
    trained it is measured on `data_uri`/eval (`measure`), and its folder keeps the figures. Raises ValueError for what
    is missing or does not fit.
    """
    store, eval_store = (VideoStore.open(f"{data_uri}/{split}") for split in ("train", "eval"))
    scale, trained = config.large_decoder.scale, checkpoint.load_config(tokenizer_uri)
    if (trained.tokenizer, trained.frame_shape) != (config.tokenizer, config.frame_shape):
        raise ValueError(
            f"the tokenizer at {tokenizer_uri} was trained with another tokenizer config or frame size: give this "
            "stage the preset and the overrides that it was trained with"
        )
    height, width = (scale * pixels for pixels in config.frame_shape[:2])
    for one in (store, eval_store):
        if tuple(one.meta["frame_shape"]) != (height, width, 3):
            has = "x".join(map(str, one.meta["frame_shape"][1::-1]))
            raise ValueError(
                f"the frames of {one.uri} are {has}, and the larger decoder's {width}x{height}, {scale} times the "
                "tokenizer's: set large_decoder.scale, or name a data set of that size"
            )
    tokenizer = checkpoint.load_tokenizer(tokenizer_uri)
    # By the weights, not by where they lie: a tokenizer that was trained again is another one.
    weights = save_tensors({key: value.contiguous() for key, value in tokenizer.state_dict().items()})
    seen = hashlib.sha256(weights + f"{store.digest} {config.frame_shape} {config.data.clip_length}".encode())
    name = model_name(
        "large-decoder", seen.hexdigest(), config, ("tokenizer", "large_decoder", "train_large_decoder", "seed"), _CODE
    )
    torch.manual_seed(config.seed)
    whole, stage = Enlarging(config, tokenizer), config.train_large_decoder
    loader = functools.partial(ClipLoader, store, stage.batch_size, config.data.clip_length, config.seed)
    uri = train_once("train-decoder", name, whole, whole, stage, loader, root_uri, log, keep=whole.decoder)
    figures = checkpoint.load_training(uri)
    if speaks() and "large_psnr" not in figures:
        checkpoint.load_weights(whole.decoder, f"{uri}/{checkpoint.WEIGHTS}")
        found, picture_HWC = measure(config, whole, eval_store)
        checkpoint.save_training(uri, figures | found)
        if log:
            log.metrics(found)
            log.image("large_frames", picture_HWC)
        psnr, bicubic, gain, interval = (found[f"large_psnr{end}"] for end in ("", "_bicubic", "_gain", "_gain_ci95"))
        summary(
            "train-decoder",
            f"on held-out frames {psnr:.2f} dB PSNR; the tokenizer's picture, enlarged by bicubic interpolation, has "
            f"{bicubic:.2f}: {gain:+.2f} ± {interval:.2f} dB",
        )
    return uri


@torch.inference_mode()
def measure(config: Config, trained: Enlarging, store: VideoStore) -> tuple[dict[str, float], NDArray[np.uint8]]:
    """PSNR of larger frames that were never trained on, and a picture: truth, larger decoder, bicubic interpolation.

    `large_psnr` pools the squared errors of a clip each of `evaluation.clips` episodes, spread evenly over the store;
    `large_psnr_bicubic` is what the tokenizer's own picture of the same tokens comes to, enlarged by bicubic
    interpolation, and `large_psnr_gain` what the larger decoder is worth beyond it, in dB. Intervals are over the
    videos that the episodes are from, or over episodes where no video is named. Raises ValueError where no two
    episodes are long enough.
    """
    scale, length = config.large_decoder.scale, config.data.clip_length
    long_enough = np.flatnonzero(store.episode_lengths >= length)
    if len(long_enough) < 2:
        raise ValueError(
            f"fewer than 2 episodes of {store.uri} have {length} frames: lower data.clip_length, or take more data"
        )
    count = min(config.evaluation.clips, len(long_enough))
    chosen = long_enough[np.linspace(0, len(long_enough) - 1, count).round().astype(int)]
    source_E = store.hashes_in("source", range(store.num_shards))[chosen]
    source_E = np.where(source_E, source_E, chosen.astype(np.uint64))
    trained.to(native.device()).eval()
    errors, shown = [], list[list[NDArray[np.float32]]]()
    for episode in bar(chosen.tolist(), desc="measure larger frames", unit="clip"):
        x_BTHWC = native.to_unit_frames(store.frames(episode, 0, length)[None])
        codes_BTNC = trained.tokenizer.encode(shrink(x_BTHWC, scale))
        large_BTHWC = trained.decoder(codes_BTNC)
        bicubic_BTHWC = enlarge(trained.tokenizer.decode(codes_BTNC), scale).clamp(0, 1)
        clips = [clip.cpu().numpy()[0] for clip in (x_BTHWC, large_BTHWC, bicubic_BTHWC)]
        errors.append([metrics.mean_squared_error(clips[0], clip).mean() for clip in clips[1:]])
        shown += [[clip[-1] for clip in clips]] if len(shown) < config.evaluation.grid_prompts else []
    large_E, bicubic_E = np.array(errors).T
    found = {
        "large_psnr": metrics.pooled_psnr(large_E, source_E),
        "large_psnr_bicubic": metrics.pooled_psnr(bicubic_E, source_E),
        "large_psnr_gain": metrics.pooled_psnr_gain(large_E, bicubic_E, source_E),
    }
    frames_RCHWC = (np.array(shown) * 255).round().clip(0, 255).astype(np.uint8)
    rows = [f"episode {episode}" for episode in chosen[: len(shown)]]
    return metrics.flatten(found), pictures.frame_table(frames_RCHWC, rows, ["true", "larger", "bicubic"], scale=1)


def enlarge(x_BTHWC: Tensor, scale: int) -> Tensor:
    """By bicubic interpolation, which may leave [0, 1] at edges."""
    x_XCHW = F.interpolate(rearrange(x_BTHWC, "b t h w c -> (b t) c h w"), scale_factor=scale, mode="bicubic")
    return rearrange(x_XCHW, "(b t) c h w -> b t h w c", b=len(x_BTHWC))
