"""The ST-transformer (section 2, Figure 4): spatial attention, causal temporal attention, one feed-forward a block.

Shape legend, used throughout the library:
    B clips   T frames   N patches of a frame   D model width   H heads   K head width   L latent width
    C codes a patch emits   V vocabulary of the codebook   A latent actions   S frames of the past kept by a cache

The past is never computed twice (ARCHITECTURE, decision 4): spatial attention stays inside its frame and temporal
attention is causal, so a finished frame's keys and values cannot change. A `TemporalCache` keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from genie_model.config import TransformerConfig

AttentionKind = Literal["factorized", "spatial", "full"]


class TemporalCache:
    """Keys and values of each world's last `window` frames, per temporal layer, in rings that are written in place.

    The frame at position p of a world lies in place p % window. So a look at a frame that is not final yet overwrites
    only what has left the window, nothing is ever moved, and shapes stay the same from the first frame to the last. In
    what order a ring lies does not matter: keys carry their positions. Worlds of a batch may differ in theirs.
    """

    def __init__(self, positions: Sequence[int] = ()) -> None:
        """Empty, of worlds whose next frames have these positions; by default of as many as come, at their first."""
        self.positions = [*positions]  # of each world: frames committed so far, the rotary position of the next one
        self.rings: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> (k_BNHSK, v_BNHSK)
        self.next: Time | None = None  # of the next frame, once it was looked at and until it is committed

    def fork(self) -> TemporalCache:
        """A copy that may go another way."""
        return self.repeat(1)

    def repeat(self, times: int) -> TemporalCache:
        """The same past for `times` copies of every world: B becomes B * times, copies side by side."""
        return self.take([world for world in range(len(self.positions)) for _ in range(times)])

    def take(self, worlds: list[int]) -> TemporalCache:
        """A copy of the pasts of these worlds, in this order."""
        twin = TemporalCache()
        twin.positions = [self.positions[world] for world in worlds]
        twin.rings = {layer: (k[worlds], v[worlds]) for layer, (k, v) in self.rings.items()}
        return twin

    @staticmethod
    def stack(caches: Sequence[TemporalCache]) -> TemporalCache:
        """The worlds of all of them, side by side."""
        joined = TemporalCache()
        joined.positions = [position for cache in caches for position in cache.positions]
        for layer in caches[0].rings:
            keys, values = zip(*(cache.rings[layer] for cache in caches), strict=True)
            joined.rings[layer] = (torch.cat(keys), torch.cat(values))
        return joined

    def write(self, layer: int, time: Time, k_BNHTK: Tensor, v_BNHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Puts frames that follow the past in their places; returns the rings. Of many, the last `window` remain."""
        B, N, H, _, K = k_BNHTK.shape
        if layer not in self.rings:
            self.rings[layer] = (k_BNHTK.new_zeros(B, N, H, time.window, K), v_BNHTK.new_zeros(B, N, H, time.window, K))
        for ring, new in zip(self.rings[layer], (k_BNHTK, v_BNHTK), strict=True):
            if len(time.place_BT) == 1:
                ring.index_copy_(3, time.place_BT[0], new[:, :, :, -time.window :])
            else:
                ring[torch.arange(B, device=new.device), :, :, time.place_BT[:, 0]] = new[:, :, :, 0]
        return self.rings[layer]


class Time(NamedTuple):
    """What temporal attention knows of the frames in a pass: angles, places in the rings, and who may see whom.

    Worlds that are equally old share one row: then B is 1 here.
    """

    cos_BT: Tensor  # (B, 1, 1, T, K/2), rotary
    sin_BT: Tensor
    place_BT: Tensor  # int64, of the last `window` frames
    bias_BTS: Tensor | None  # (B, T, S), 0 where allowed and -inf elsewhere; none: all is allowed
    window: int


def rotary_angles(positions_BT: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, 1, T, K/2) of rotary embeddings (Su et al., 2021): only differences of positions matter."""
    frequencies = 1.0 / 100.0 ** (torch.arange(0, head_dim, 2, device=positions_BT.device).float() / head_dim)
    angles = positions_BT.float()[:, None, None, :, None] * frequencies
    return angles.cos(), angles.sin()


class Attention(nn.Module):
    """Multi-head self-attention over one axis.

    On CPUs two batched matmuls and a softmax: over axes as short as a clip's 16 frames or a frame's 64 patches, the
    fused kernel's backward is several times slower there (5-9x, torch 2.13, bf16).
    """

    scale_K: Tensor  # K^-1/4, of both queries and keys: their products have softmax attention's K^-1/2

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        inner = config.num_heads * config.head_dim
        self.norm = nn.LayerNorm(config.d_model)
        # Head by head its queries, keys and values: so tensor parallelism cuts it, as `out`, between heads.
        self.heads_in = nn.Linear(config.d_model, inner * 3, bias=False)
        self.qk_scale = nn.Parameter(torch.ones(2, config.head_dim)) if config.qk_norm else None
        self.register_buffer("scale_K", torch.full((config.head_dim,), config.head_dim**-0.25), persistent=False)
        self.out = nn.Linear(inner, config.d_model, bias=False)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """qk (..., H, 2, K), normalised where the config says so (section 3) and scaled, and v (..., H, K)."""
        qkv = self.heads_in(self.norm(x)).unflatten(-1, (-1, 3, self.head_dim))
        qk, v = qkv[..., :2, :], qkv[..., 2, :]
        if self.qk_scale is not None:
            qk = F.layer_norm(qk, (self.head_dim,), self.scale_K) * self.qk_scale.to(qk.dtype)
        else:
            qk = qk * self.head_dim**-0.25
        return qk, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., queries, K) x (..., keys, K) -> (..., queries, K); `bias` is 0 where allowed and -inf elsewhere."""
        if q.is_cuda:
            return _fused_attention(q, k, v, bias)
        scores = q @ k.transpose(-1, -2)
        if bias is not None:
            scores = scores + bias.to(scores.dtype)
        out: Tensor = scores.softmax(-1).to(q.dtype) @ v
        return out


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Of queries and keys that are scaled already. The kernels take four dimensions, (X, H, T, K)."""
    if bias is not None and len(bias) > 1:  # worlds of different ages
        bias = bias.expand(*q.shape[:-3], *bias.shape[-3:])
    mask = None if bias is None else bias.to(q.dtype).flatten(0, -4)
    flat_q, flat_k, flat_v = (x.flatten(0, -4) for x in (q, k, v))
    return F.scaled_dot_product_attention(flat_q, flat_k, flat_v, attn_mask=mask, scale=1.0).view(q.shape)


class SpatialAttention(Attention):
    """Every patch attends to all patches of its own frame."""

    def forward(self, x_BTND: Tensor) -> Tensor:
        qk, v = self.queries_keys_values(x_BTND)
        q, k = rearrange(qk, "b t n h two k -> two (b t) h n k")
        o = self.attend(q, k, rearrange(v, "b t n h k -> (b t) h n k"))
        merged: Tensor = self.out(rearrange(o, "(b t) h n k -> b t n (h k)", b=x_BTND.shape[0]))
        return merged


class TemporalAttention(Attention):
    """Every patch attends to the same patch of its own and earlier frames, at most `window` of them."""

    def __init__(self, config: TransformerConfig, window: int) -> None:
        super().__init__(config)
        self.window = window

    def forward(self, x_BTND: Tensor, time: Time, cache: TemporalCache | None, layer: int, commit: bool) -> Tensor:
        qk, v_BNHTK = self.queries_keys_values(x_BTND)
        qk_2BNHTK = rearrange(qk, "b t n h two k -> two b n h t k")
        q_BNHTK, k_BNHTK = self._rotate(qk_2BNHTK, time.cos_BT.to(qk.dtype), time.sin_BT.to(qk.dtype))
        k_BNHSK, v_BNHSK = k_BNHTK, v_BNHTK = k_BNHTK, rearrange(v_BNHTK, "b t n h k -> b n h t k")
        if cache is not None and (commit or x_BTND.shape[1] == 1):
            rings = cache.write(layer, time, k_BNHTK, v_BNHTK)
            if x_BTND.shape[1] == 1:
                k_BNHSK, v_BNHSK = rings
        o_BNHTK = self.attend_in_time(q_BNHTK, k_BNHSK, v_BNHSK, time.bias_BTS)
        merged: Tensor = self.out(rearrange(o_BNHTK, "b n h t k -> b t n (h k)"))
        return merged

    def attend_in_time(self, q_BNHTK: Tensor, k_BNHSK: Tensor, v_BNHSK: Tensor, bias_BTS: Tensor | None) -> Tensor:
        return self.attend(q_BNHTK, k_BNHSK, v_BNHSK, None if bias_BTS is None else bias_BTS[:, None, None])

    def _rotate(self, x_2BNHTK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x_2BNHTK.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class SpaceTimeAttention(TemporalAttention):
    """Every patch attends to all patches of its own and earlier frames, as in C-ViViT (Villegas et al., 2023)."""

    def attend_in_time(self, q_BNHTK: Tensor, k_BNHSK: Tensor, v_BNHSK: Tensor, bias_BTS: Tensor | None) -> Tensor:
        N = q_BNHTK.shape[1]
        bias = None if bias_BTS is None else bias_BTS.repeat_interleave(N, 1).repeat_interleave(N, 2)[:, None]
        q, k, v = (rearrange(x, "b n h t k -> b h (t n) k") for x in (q_BNHTK, k_BNHSK, v_BNHSK))
        return rearrange(self.attend(q, k, v, bias), "b h (t n) k -> b n h t k", n=N)


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
        self.config, self.window, self.attention = config, window, attention
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
        self._block_ends = [i for i in range(1, len(sublayers)) if isinstance(sublayers[i - 1], FeedForward)]
        self._block_ends.append(len(sublayers))
        # Behind the last keys and values, nothing that becomes past is computed.
        self._past_ends = max(
            (i + 1 for i, module in enumerate(sublayers) if isinstance(module, TemporalAttention)), default=0
        )
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
        """With a cache, x holds only what follows its past: any frames after none, then one at a time.

        `commit` makes them past. Without it they only look, and the next look overwrites them.
        """
        y_BTND: Tensor = self.norm(self.through(x_BTND, cache, commit, len(self.sublayers)))
        return y_BTND

    def remember(self, x_BTND: Tensor, cache: TemporalCache) -> None:
        """`forward` with `commit` for the cache's sake alone."""
        self.through(x_BTND, cache, True, self._past_ends)

    def through(self, x_BTND: Tensor, cache: TemporalCache | None, commit: bool, sublayers: int) -> Tensor:
        """The first `sublayers` of them, and no norm."""
        B, T = x_BTND.shape[:2]
        time = self.time(x_BTND.device, B, T, cache)
        for start, end in pairwise([0, *self._block_ends]):
            x_BTND = self.block(x_BTND, range(start, min(end, sublayers)), time, cache, commit)
        if cache is not None and commit:
            cache.positions, cache.next = [position + T for position in cache.positions], None
        return x_BTND

    def block(
        self, x_BTND: Tensor, sublayers: Iterable[int], time: Time, cache: TemporalCache | None, commit: bool
    ) -> Tensor:
        """What `recompute` makes again as a whole."""
        for i in sublayers:
            sublayer = self.sublayers[i]
            if isinstance(sublayer, TemporalAttention):
                x_BTND = x_BTND + sublayer(x_BTND, time, cache, i, commit)
            else:
                x_BTND = x_BTND + sublayer(x_BTND)
        return x_BTND

    def time(self, device: torch.device, B: int, T: int, cache: TemporalCache | None) -> Time:
        """Of T frames that follow the past of B worlds; a single one of them looks in the cache's rings."""
        if cache is None:
            return self._time(device, T, [0], ring=False)
        if not cache.positions:
            cache.positions = [0] * B
        assert T == 1 or not any(cache.positions), "after the first frames of a cache come single ones"
        if T > 1:
            return self._time(device, T, [0], ring=True)
        if cache.next is None:
            same = len(set(cache.positions)) == 1
            cache.next = self._time(device, 1, cache.positions[:1] if same else cache.positions, ring=True)
        return cache.next

    def _time(self, device: torch.device, T: int, past: list[int], ring: bool) -> Time:
        past_B1 = torch.zeros(len(past), 1, dtype=torch.long, device=device)
        if any(past):  # from the host: what training's captured graph may not ask for, whose clips start at 0
            past_B1 = torch.tensor(past, device=device)[:, None]
        steps_T = torch.arange(T, device=device)
        seen_BTS = bias_BTS = None
        if T > 1:
            age_TT = steps_T[:, None] - steps_T
            seen_BTS = ((age_TT >= 0) & (age_TT < self.window))[None]
        elif ring and min(past) < self.window - 1:  # places beyond a world's own are still empty
            seen_BTS = (torch.arange(self.window, device=device) <= past_B1)[:, None]
        if seen_BTS is not None:
            bias_BTS = torch.zeros(seen_BTS.shape, device=device).masked_fill(~seen_BTS, float("-inf"))
        position_BT = past_B1 + steps_T
        place_BT = position_BT[:, max(T - self.window, 0) :] % self.window
        return Time(*rotary_angles(position_BT, self.config.head_dim), place_BT, bias_BTS, self.window)


def sublayers(module: nn.Module) -> list[nn.Module]:
    """The attentions and feed-forwards of its transformers: the units of sharding and compilation."""
    return [s for m in module.modules() if isinstance(m, STTransformer) for s in m.sublayers]


def recompute(module: nn.Module, checkpoint: Callable[..., Tensor]) -> None:
    """Its ST blocks run under this function, which keeps their inputs and computes them again in the backward pass.

    Block by block and not sublayer by sublayer: a third of the inputs, which are most of what a deep model then keeps.
    """
    for part in module.modules():
        if isinstance(part, STTransformer):
            part.block = partial(checkpoint, part.block)  # type: ignore[method-assign]


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
