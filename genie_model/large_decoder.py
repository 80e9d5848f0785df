"""The larger decoder (section 3.1): the tokenizer's tokens as larger frames, 160 x 90 pixels as 640 x 360.

It is the tokenizer's decoder with patches `scale` times as large, so it streams as that does: tokens, and what came
before them, decide a picture. Its file lies apart from the Genie's, in a folder of its own, and goes with any Genie
that has the tokenizer it was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from torch import Tensor, nn

from genie_model import checkpoint
from genie_model.backend import native
from genie_model.config import Config
from genie_model.genie import Genie, frames_remembered, to_uint8
from genie_model.layers import PatchGrid, TemporalCache
from genie_model.tokenizer import TokenDecoder, VideoTokenizer

FOLDER = "large_decoder"  # where it lies in the folder of the Genie that it goes with


class LargeDecoder(TokenDecoder):
    """Codes (B, T, N, C) -> frames in [0, 1], `scale` times as high and wide as the tokenizer's."""

    codebook_VL: Tensor  # the tokenizer's

    def __init__(self, config: Config) -> None:
        super().__init__()
        part, tokenizer = config.large_decoder, config.tokenizer
        height, width = (part.scale * pixels for pixels in config.frame_shape[:2])
        grid = PatchGrid(height, width, part.scale * tokenizer.patch_size)
        self.make_decoder(tokenizer, part.transformer or tokenizer.decoder, grid, config.data.clip_length)
        self.register_buffer("codebook_VL", torch.zeros(tokenizer.codebook.num_codes, tokenizer.codebook.latent_dim))
        self.precision = config.sampling.precision  # of play

    @torch.no_grad()
    def start_from(self, tokenizer: VideoTokenizer) -> None:
        """Takes over its codebook and, where the transformers are alike, its decoder.

        The layers that end in pixels are enlarged as pictures are: before it has learnt anything, the larger decoder
        shows what the small one does, each patch (or each code's square) enlarged by itself.
        """
        self.codebook_VL.copy_(tokenizer.quantizer.codebook_VL)
        if self.config.codes_per_patch > 1:
            _enlarge(tokenizer.square_out, self.square_out)
        if self.decoder.config == tokenizer.decoder.config:
            self.from_latent.load_state_dict(tokenizer.from_latent.state_dict())
            self.decoder_position.copy_(tokenizer.decoder_position)
            self.decoder.load_state_dict(tokenizer.decoder.state_dict())
            _enlarge(tokenizer.patch_out, self.patch_out)
        elif self.config.codes_per_patch > 1:  # the squares are a picture already
            self.patch_out.weight.mul_(0.1)
            self.patch_out.bias.zero_()

    def forward(self, codes_BTNC: Tensor, cache: TemporalCache | None = None) -> Tensor:
        """With a cache the frames continue, and join, its past."""
        return self.decode(codes_BTNC, cache).clamp(0, 1)

    def decode(self, codes_BTNC: Tensor, cache: TemporalCache | None = None) -> Tensor:
        """As `forward`; numbers beyond [0, 1] are still there, for training to mend."""
        return self.decode_latents(F.embedding(codes_BTNC, self.codebook_VL), cache).float()

    @property
    def picture_memory(self) -> int:
        """Frames whose codes decide one picture, its own among them."""
        return frames_remembered(self.decoder)

    @torch.no_grad()
    def show(self, codes_BNC: Tensor, cache: TemporalCache) -> Tensor:
        """The uint8 pictures (B, H, W, 3), on the CPU, of frames that follow, and join, the cache's past."""
        with native.autocast(self.precision):
            x_B1HWC = self(codes_BNC[:, None].to(self.codebook_VL.device), cache)
        return to_uint8(x_B1HWC[:, 0]).cpu()

    def painting(self, codes_BTNC: Tensor, cache: TemporalCache) -> Iterator[Tensor]:
        """`show` frame by frame: those behind the cache's first `picture_memory`, or behind frame 0, are exact."""
        for frame in range(codes_BTNC.shape[1]):
            yield self.show(codes_BTNC[:, frame], cache)


def load_large_decoder(uri: str, genie: Genie) -> LargeDecoder:
    """In evaluation mode, where the Genie is. Raises ValueError where it is broken or knows other tokens."""
    decoder = LargeDecoder(checkpoint.load_config(uri))
    checkpoint.load_weights(decoder, f"{uri}/{checkpoint.WEIGHTS}")
    decoder.to(genie.device)
    codebook_VL = genie.tokenizer.quantizer.codebook_VL
    if decoder.config != genie.config.tokenizer or not torch.equal(decoder.codebook_VL, codebook_VL):
        raise ValueError(f"the larger decoder at {uri} was trained on another tokenizer: train one on this model's")
    decoder.precision = genie.config.sampling.precision
    return decoder.eval()


def check_fits(folder: Path) -> None:
    """Raises ValueError where the larger decoder in a Genie's folder was trained on another tokenizer."""
    with (
        safe_open(folder / checkpoint.WEIGHTS, "pt") as genie,
        safe_open(folder / FOLDER / checkpoint.WEIGHTS, "pt") as decoder,
    ):
        codebooks = genie.get_tensor("tokenizer.quantizer.codebook_VL"), decoder.get_tensor("codebook_VL")
    if not torch.equal(*codebooks):
        raise ValueError("the larger decoder was trained on another tokenizer: train one on this model's")


def _enlarge(small: nn.Linear, large: nn.Linear) -> None:
    """Gives `large` the weights of `small`, whose outputs are squares of pixels, enlarged by bicubic interpolation."""
    side, larger = (round((layer.out_features / 3) ** 0.5) for layer in (small, large))
    for from_PD, to_PD in ((small.weight, large.weight), (small.bias[:, None], large.bias[:, None])):
        pictures_DCPQ = rearrange(from_PD, "(p q c) d -> d c p q", p=side, c=3)
        pictures_DCPQ = F.interpolate(pictures_DCPQ, (larger, larger), mode="bicubic")
        to_PD.copy_(rearrange(pictures_DCPQ, "d c p q -> (p q c) d"))
