"""The video tokenizer (section 2.1): a VQ-VAE whose encoder and decoder are causal ST-transformers (ST-ViViT).

The two others of Table 3 are a config field: `vit`, which codes every frame alone, and `c_vivit`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from genie_model import collectives
from genie_model.chance import Chance
from genie_model.config import TokenizerConfig, TransformerConfig
from genie_model.layers import AttentionKind, PatchGrid, STTransformer, TemporalCache
from genie_model.quantizer import VectorQuantizer

_ATTENTION: dict[str, AttentionKind] = {"st_vivit": "factorized", "vit": "spatial", "c_vivit": "full"}


class TokenDecoder(nn.Module):
    """Vectors of codes -> frames: half of the tokenizer, and by itself the larger decoder (large_decoder.py)."""

    def make_decoder(
        self, config: TokenizerConfig, transformer: TransformerConfig, grid: PatchGrid, window: int
    ) -> None:
        """Its layers, for frames of that grid: called where they have their place in the order of the module's own."""
        self.config, self.grid, self.num_patches = config, grid, grid.num_patches
        pixels = grid.patch**2 * 3
        self.from_latent = nn.Linear(config.token_dim, transformer.d_model)
        self.decoder_position = nn.Parameter(0.02 * torch.randn(self.num_patches, transformer.d_model))
        self.decoder = STTransformer(transformer, window, _ATTENTION[config.architecture])
        self.patch_out = nn.Linear(transformer.d_model, pixels)
        self.squares = math.isqrt(config.codes_per_patch)  # per side
        if config.codes_per_patch > 1:
            self.square_out = nn.Linear(config.codebook.latent_dim, pixels // config.codes_per_patch)

    def decode_latents(self, latents_BTNCL: Tensor, cache: TemporalCache | None = None) -> Tensor:
        """Frames as they come, not held to [0, 1]; with a cache they continue, and join, its past."""
        h_BTND = self.from_latent(latents_BTNCL.flatten(-2))
        h_BTND = self.decoder(h_BTND + self.decoder_position.to(h_BTND.dtype), cache, commit=cache is not None)
        patches: Tensor = self.patch_out(h_BTND)
        if self.config.codes_per_patch > 1:
            squares, side = self.square_out(latents_BTNCL), self.grid.patch // self.squares
            patches = patches + rearrange(
                squares, "b t n (a d) (p q c) -> b t n (a p d q c)", a=self.squares, p=side, q=side
            )
        # Zero output is mid-grey: the picture's own mean costs no capacity.
        return self.grid.join(patches + 0.5)


class VideoTokenizer(TokenDecoder):
    """Frames in [0, 1] <-> N * C discrete codes a frame. Code z_t has seen x_1..t and nothing later.

    C = `codes_per_patch` codes leave each patch: with 1 it is the paper's; more buy the bits of smaller patches at the
    compute of larger ones, which is what a two-core machine can afford. Each of them then stands for its own square of
    the patch and has a linear path from and to that square's pixels; the transformers add what the context tells. So
    codes mean the same wherever and whenever they occur, and one wrong code spoils one small square. The linear paths
    start as the cosine transform (as JPEG's) and the rest starts small: before it has learnt anything, the tokenizer
    is the k-means of small squares of pixels, and codes are as far apart as what they show.
    """

    def __init__(self, config: TokenizerConfig, height: int, width: int, window: int) -> None:
        super().__init__()
        grid = PatchGrid(height, width, config.patch_size)
        pixels = config.patch_size**2 * 3
        self.patch_in = nn.Linear(pixels, config.encoder.d_model)
        self.encoder_position = nn.Parameter(0.02 * torch.randn(grid.num_patches, config.encoder.d_model))
        self.encoder = STTransformer(config.encoder, window, _ATTENTION[config.architecture])
        self.to_latent = nn.Linear(config.encoder.d_model, config.token_dim)
        self.quantizer = VectorQuantizer(config.codebook)
        self.make_decoder(config, config.decoder, grid, window)
        if config.codes_per_patch > 1:
            self.square_in = nn.Linear(pixels // config.codes_per_patch, config.codebook.latent_dim)
            self._start_from_squares()

    @torch.no_grad()
    def _start_from_squares(self) -> None:
        basis_LP = cosine_transform(self.config.patch_size // self.squares)[: self.config.codebook.latent_dim]
        L = len(basis_LP)
        self.square_in.weight[:L] = basis_LP
        self.square_in.bias[:L] = -0.5 * basis_LP.sum(-1)  # mid-grey is zero, as in decode_latents
        self.square_out.weight[:, :L] = basis_LP.T
        self.square_out.bias.zero_()
        for small in (self.to_latent, self.patch_out):
            small.weight.mul_(0.1)
            small.bias.zero_()

    def forward(self, x_BTHWC: Tensor, chance: Chance | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss of a batch of clips in [0, 1], and what to log. Codes learn where `chance` is given."""
        quantized = self.quantizer(self._encode(x_BTHWC), chance)
        error = F.mse_loss(self.decode_latents(quantized.latents).float(), x_BTHWC.float())
        logs = {"mse": error, "psnr": -10 * collectives.mean(error).log10(), "quantizer_loss": quantized.loss}
        logs |= {f"code_{name}": value for name, value in quantized.logs.items()}
        return error + quantized.loss, {name: value.detach() for name, value in logs.items()}

    def encode(self, x_BTHWC: Tensor) -> Tensor:
        """Frames in [0, 1] -> codes (B, T, N, C)."""
        return self.quantizer.encode(self._encode(x_BTHWC))

    def decode(self, codes_BTNC: Tensor, cache: TemporalCache | None = None) -> Tensor:
        """Codes -> frames in [0, 1]; with a cache the frames continue, and join, its past."""
        return self.decode_latents(self.quantizer.embed(codes_BTNC), cache).float().clamp(0, 1)

    def _encode(self, x_BTHWC: Tensor) -> Tensor:
        patches = self.grid.cut(x_BTHWC)
        h_BTND = self.patch_in(patches)
        h_BTND = self.encoder(h_BTND + self.encoder_position.to(h_BTND.dtype))
        latents: Tensor = self.to_latent(h_BTND)
        latents = latents.reshape(*latents.shape[:-1], self.config.codes_per_patch, -1)
        if self.config.codes_per_patch > 1:
            side = self.config.patch_size // self.squares
            squares = rearrange(
                patches, "b t n (a p d q c) -> b t n (a d) (p q c)", a=self.squares, p=side, q=side, c=3
            )
            latents = latents + self.square_in(squares)
        return latents


def cosine_transform(side: int) -> Tensor:
    """An orthonormal basis of (side, side, 3) squares, the lowest frequencies first: rows of (3 side^2, 3 side^2).

    The two-dimensional DCT-II, and of the colours their sum before their differences.
    """
    frequency_F, place_P = torch.arange(side).float(), torch.arange(side).float()
    waves_FP = torch.cos(math.pi * (place_P + 0.5) * frequency_F[:, None] / side)
    colours_KC = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
    waves_FP, colours_KC = F.normalize(waves_FP), F.normalize(colours_KC)
    basis = torch.einsum("fp,gq,kc->fgkpqc", waves_FP, waves_FP, colours_KC).flatten(3).flatten(0, 1)
    by_frequency = (frequency_F[:, None].square() + frequency_F.square()).flatten().argsort(stable=True)
    return basis[by_frequency].flatten(0, 1)
