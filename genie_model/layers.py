"""The ST-transformer (section 2, Figure 4): spatial attention, causal temporal attention, one feed-forward a block.

Shape legend, used throughout the library:
    B clips   T frames   N patches of a frame   D model width   H heads   K head width   L latent width
    C codes a patch emits   V vocabulary of the codebook   A latent actions   S frames of the past kept by a cache

The past is never computed twice (ARCHITECTURE, decision 4): spatial attention stays inside its frame and temporal
attention is causal, so a finished frame's keys and values cannot change. A `TemporalCache` keeps them.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from genie_model.config import TransformerConfig

AttentionKind = Literal["factorized", "spatial", "full"]
Pieces = list[tuple[Tensor, Tensor]]  # keys and values, the older ones first


class TemporalCache:
    """Keys and values of the frames before this one, per temporal layer; at most `window - 1` frames of them.

    Tensors in it are replaced, never written into, so `fork()` may share them.
    """

    def __init__(self) -> None:
        self.position = 0  # frames committed so far: the rotary position of the next one
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> (k_BNHSK, v_BNHSK)

    def fork(self) -> TemporalCache:
        twin = TemporalCache()
        twin.position, twin.layers = self.position, dict(self.layers)
        return twin

    def repeat(self, times: int) -> TemporalCache:
        """The same past for `times` copies of every clip: B becomes B * times, copies side by side."""
        twin = self.fork()
        twin.layers = {
            i: (k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)) for i, (k, v) in self.layers.items()
        }
        return twin


def rotary_angles(positions_T: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin (T, K/2) of rotary embeddings (Su et al., 2021): only differences of positions matter."""
    frequencies = 1.0 / 100.0 ** (torch.arange(0, head_dim, 2, device=positions_T.device).float() / head_dim)
    angles = positions_T.float()[:, None] * frequencies
    return angles.cos(), angles.sin()


class Attention(nn.Module):
    """Multi-head self-attention over one axis.

    Two batched matmuls and a softmax: over axes as short as a clip's 16 frames or a frame's 64 patches, the fused CPU
    kernel's backward is several times slower (5-9x, torch 2.13, bf16).
    """

    scale_K: Tensor  # K^-1/4, of both queries and keys: their products have softmax attention's K^-1/2

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.num_heads, config.head_dim
        inner = config.num_heads * config.head_dim
        self.norm = nn.LayerNorm(config.d_model)
        self.qkv = nn.Linear(config.d_model, 3 * inner, bias=False)
        self.qk_scale = nn.Parameter(torch.ones(2, 1, config.head_dim)) if config.qk_norm else None
        self.register_buffer("scale_K", torch.full((config.head_dim,), config.head_dim**-0.25), persistent=False)
        self.out = nn.Linear(inner, config.d_model, bias=False)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """qk (..., 2, H, K), normalised where the config says so (section 3) and scaled, and v (..., H, K)."""
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, self.head_dim))
        qk, v = qkv[..., :2, :, :], qkv[..., 2, :, :]
        if self.qk_scale is not None:
            qk = F.layer_norm(qk, (self.head_dim,), self.scale_K) * self.qk_scale.to(qk.dtype)
        else:
            qk = qk * self.head_dim**-0.25
        return qk, v

    def attend(self, q: Tensor, pieces: Pieces, bias: Tensor | None) -> Tensor:
        """(..., queries, K) x (..., keys, K) -> (..., queries, K); `bias` is 0 where allowed and -inf elsewhere.

        Keys and values may come in pieces, which are never joined: the past is not copied to look at it. A piece of one
        key, as a played frame's own, is looked at number by number: as a matmul it costs ten times as much (CPU, bf16).
        """
        one = q.shape[-2] == 1
        scores = [
            (q * k).sum(-1, keepdim=True) if one and k.shape[-2] == 1 else q @ k.transpose(-1, -2) for k, _ in pieces
        ]
        joined = scores[0] if len(scores) == 1 else torch.cat(scores, -1)
        if bias is not None:
            joined = joined + bias.to(joined.dtype)
        weights = torch.split(joined.softmax(-1).to(q.dtype), [k.shape[-2] for k, _ in pieces], -1)
        out, *more = (w * v if one and v.shape[-2] == 1 else w @ v for w, (_, v) in zip(weights, pieces, strict=True))
        for part in more:
            out = out + part
        return out


class SpatialAttention(Attention):
    """Every patch attends to all patches of its own frame."""

    def forward(self, x_BTND: Tensor) -> Tensor:
        qk, v = self.queries_keys_values(x_BTND)
        q, k = rearrange(qk, "b t n two h k -> two (b t) h n k")
        o = self.attend(q, [(k, rearrange(v, "b t n h k -> (b t) h n k"))], bias=None)
        merged: Tensor = self.out(rearrange(o, "(b t) h n k -> b t n (h k)", b=x_BTND.shape[0]))
        return merged


class TemporalAttention(Attention):
    """Every patch attends to the same patch of its own and earlier frames, at most `window` of them."""

    def __init__(self, config: TransformerConfig, window: int) -> None:
        super().__init__(config)
        self.window = window

    def forward(
        self, x_BTND: Tensor, rotary: tuple[Tensor, Tensor], cache: TemporalCache | None, layer: int, commit: bool
    ) -> Tensor:
        T = x_BTND.shape[1]
        qk, v = self.queries_keys_values(x_BTND)
        q, k = self._rotate(rearrange(qk, "b t n two h k -> two b n h t k"), *rotary)
        v = rearrange(v, "b t n h k -> b n h t k")
        pieces, past = [(k, v)], 0
        if cache is not None and layer in cache.layers:
            pieces.insert(0, cache.layers[layer])
            past = pieces[0][0].shape[-2]
        o_BNHTK = self.attend_in_time(q, pieces, self._bias(T, past, x_BTND.device))
        if cache is not None and commit:
            first = max(past + T - (self.window - 1), 0)
            k, v = (torch.cat(parts, -2)[..., first:, :].contiguous() for parts in zip(*pieces, strict=True))
            cache.layers[layer] = (k, v)
        merged: Tensor = self.out(rearrange(o_BNHTK, "b n h t k -> b t n (h k)"))
        return merged

    def attend_in_time(self, q_BNHTK: Tensor, pieces: Pieces, bias_TS: Tensor | None) -> Tensor:
        return self.attend(q_BNHTK, pieces, bias_TS)

    def _rotate(self, x_2BNHTK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.to(x_2BNHTK.dtype), sin.to(x_2BNHTK.dtype)
        a, b = x_2BNHTK.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def _bias(self, T: int, past: int, device: torch.device) -> Tensor | None:
        """Causal and at most `window` long: query i stands at past + i among the keys."""
        if T == 1 and past < self.window:
            return None
        age = torch.arange(past, past + T, device=device)[:, None] - torch.arange(past + T, device=device)
        return torch.zeros(T, past + T, device=device).masked_fill((age < 0) | (age >= self.window), float("-inf"))


class SpaceTimeAttention(TemporalAttention):
    """Every patch attends to all patches of its own and earlier frames, as in C-ViViT (Villegas et al., 2023)."""

    def attend_in_time(self, q_BNHTK: Tensor, pieces: Pieces, bias_TS: Tensor | None) -> Tensor:
        N, together = q_BNHTK.shape[1], "b n h t k -> b h (t n) k"
        bias = None if bias_TS is None else bias_TS.repeat_interleave(N, 0).repeat_interleave(N, 1)
        joined = [(rearrange(k, together), rearrange(v, together)) for k, v in pieces]
        o = self.attend(rearrange(q_BNHTK, together), joined, bias)
        return rearrange(o, "b h (t n) k -> b n h t k", n=N)


class FeedForward(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model)
        self.up = nn.Linear(config.d_model, config.mlp_ratio * config.d_model, bias=False)
        self.down = nn.Linear(config.mlp_ratio * config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.gelu(self.up(self.norm(x))))
        return y


class TokenLinear(nn.Linear):
    """A linear layer from or to tokens: optim.py gives it the learning rate of embeddings."""


class STTransformer(nn.Module):
    """(B, T, N, D) -> (B, T, N, D). `num_layers` counts attention layers: see TransformerConfig.

    `attention` says which: "factorized" alternates between space and time and has a feed-forward after both, as all of
    Genie; "spatial" (ViT) and "full" (C-ViViT) are what Table 3 compares it with, with a feed-forward after each.
    """

    def __init__(self, config: TransformerConfig, window: int, attention: AttentionKind = "factorized") -> None:
        super().__init__()
        self.config = config
        sublayers: list[nn.Module] = []
        for i in range(config.num_layers):
            if attention == "spatial":
                sublayers += [SpatialAttention(config), FeedForward(config)]
            elif attention == "full":
                sublayers += [SpaceTimeAttention(config, window), FeedForward(config)]
            elif i % 2 == 0:
                sublayers.append(SpatialAttention(config))
            else:
                if (i // 2 + 1) % config.temporal_every == 0:
                    sublayers.append(TemporalAttention(config, window))
                sublayers.append(FeedForward(config))
        self.sublayers = nn.ModuleList(sublayers)
        self.norm = nn.LayerNorm(config.d_model)
        self._init_weights()

    def _init_weights(self) -> None:
        """Residual branches start small (GPT-2), so that depth does not blow up the stream."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=self.config.d_model**-0.5)
        for sublayer in self.sublayers:
            last = sublayer.down if isinstance(sublayer, FeedForward) else sublayer.out
            assert isinstance(last, nn.Linear)
            last.weight.data *= (2 * self.config.num_layers) ** -0.5

    def forward(self, x_BTND: Tensor, cache: TemporalCache | None = None, commit: bool = False) -> Tensor:
        """With a cache, x holds only the frames that follow its past; `commit` adds them to it."""
        start = cache.position if cache else 0
        positions_T = torch.arange(start, start + x_BTND.shape[1], device=x_BTND.device)
        rotary = rotary_angles(positions_T, self.config.head_dim)
        for i, sublayer in enumerate(self.sublayers):
            if isinstance(sublayer, TemporalAttention):
                x_BTND = x_BTND + sublayer(x_BTND, rotary, cache, i, commit)
            else:
                x_BTND = x_BTND + sublayer(x_BTND)
        if cache is not None and commit:
            cache.position += x_BTND.shape[1]
        y_BTND: Tensor = self.norm(x_BTND)
        return y_BTND


class PatchGrid:
    """How frames are cut into N = rows * columns patches of P = patch * patch * 3 numbers, and put together again.

    Where patches do not fit (the paper's 160 x 90 frames, patches of 4 and 16), the last row and column of pixels go on
    to the patch's end, and are cut off again: 40 x 23 patches of 4, which makes Table 10's 750B tokens.
    """

    def __init__(self, height: int, width: int, patch: int) -> None:
        self.height, self.width, self.patch = height, width, patch
        self.rows, self.columns = -(-height // patch), -(-width // patch)
        self.num_patches = self.rows * self.columns

    def cut(self, x_BTHWC: Tensor) -> Tensor:
        """(B, T, H, W, 3) -> (B, T, N, P)."""
        below, right = self.rows * self.patch - self.height, self.columns * self.patch - self.width
        if below:
            x_BTHWC = torch.cat([x_BTHWC, x_BTHWC[:, :, -1:].expand(-1, -1, below, -1, -1)], 2)
        if right:
            x_BTHWC = torch.cat([x_BTHWC, x_BTHWC[:, :, :, -1:].expand(-1, -1, -1, right, -1)], 3)
        return rearrange(x_BTHWC, "b t (h p) (w q) c -> b t (h w) (p q c)", p=self.patch, q=self.patch)

    def join(self, x_BTNP: Tensor) -> Tensor:
        """(B, T, N, P) -> (B, T, H, W, 3)."""
        return self.tile(x_BTNP)[:, :, : self.height, : self.width]

    def tile(self, x_BTNP: Tensor) -> Tensor:
        """(B, T, N, P) -> (B, T, rows * patch, columns * patch, 3): what `cut` added is still there."""
        return rearrange(x_BTNP, "b t (h w) (p q c) -> b t (h p) (w q) c", p=self.patch, q=self.patch, h=self.rows)
