"""Tokens computed once: what a frozen tokenizer makes of a data set's clips, kept as a data set of their own."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save as save_tensors

from genie_model import collectives
from genie_model.backend import native
from genie_model.config import Config
from genie_model.data.shards import Meta, compress, missing_shards, write_index, write_shard
from genie_model.data.store import VideoStore
from genie_model.progress import bar, summary
from genie_model.source import code_digest
from genie_model.tokenizer import VideoTokenizer

_CODE = ("backend/native.py", "layers.py", "quantizer.py", "tokenizer.py", "tokens.py")
_BATCH = 16  # clips at a time


def tokens_of(config: Config, store: VideoStore, tokenizer: VideoTokenizer, root_uri: str) -> VideoStore:
    """The tokens of every clip that starts at a multiple of `data.clip_length`, made now unless they lie there already.

    A frame of this data set is (N, C, 2) bytes, its codes as little-endian uint16; episode i is episode i of `store`,
    up to its last whole clip. A clip is encoded by itself, as in play: its codes have seen nothing before its start.
    """
    clip, precision = config.data.clip_length, config.train_world.precision
    # By the weights, not by where they lie: a tokenizer that was trained again is another one.
    weights = save_tensors({key: value.detach().cpu().contiguous() for key, value in tokenizer.state_dict().items()})
    asked = hashlib.sha256(weights + f"{config.tokenizer} {store.digest} {clip} {precision}".encode()).hexdigest()
    uri = f"{root_uri}/tokens/tokens-{asked[:12]}-{code_digest(_CODE)}"
    missing, (index, count) = missing_shards(uri, store.num_shards), collectives.place()
    collectives.meet()  # all have seen the same are missing
    own = missing[index::count]
    tokenizer.to(native.device()).eval()
    frame_shape = (tokenizer.num_patches, config.tokenizer.codes_per_patch, 2)
    with bar(desc="tokenize", unit="frame", total=sum(_frames(store, shard, clip) for shard in own)) as progress:
        for shard in own:
            codes = _encode(store, shard, tokenizer, clip, precision)
            episodes = [compress(codes_TNC) for codes_TNC in codes]
            write_shard(uri, shard, episodes, frame_shape)
            progress.update(_frames(store, shard, clip))
    collectives.meet()
    if index == 0:
        meta: Meta = {**store.meta, "source": "tokens", "frame_shape": list(frame_shape), "codec": "zstd"}
        write_index(uri, store.num_shards, meta)
    collectives.meet()
    summary("tokenize", f"{'made' if missing else 'reused'} {uri}")
    return VideoStore.open(uri)


def _frames(store: VideoStore, shard: int, clip: int) -> int:
    """Of all whole clips of the shard's episodes."""
    return int((store.lengths_in(range(shard, shard + 1)) // clip * clip).sum())


def _encode(
    store: VideoStore, shard: int, tokenizer: VideoTokenizer, clip: int, precision: str
) -> list[NDArray[np.uint16]]:
    """The codes (T, N, C) of each episode in the shard."""
    counts = (store.lengths_in(range(shard, shard + 1)) // clip).tolist()
    clips = [
        (episode, i * clip)
        for episode, count in zip(store.episodes_in(shard), counts, strict=True)
        for i in range(count)
    ]
    empty = np.empty((0, tokenizer.num_patches, tokenizer.config.codes_per_patch), np.uint16)
    found = [empty]
    for begin in range(0, len(clips), _BATCH):
        batch_BTHWC = np.stack([store.frames(episode, start, clip) for episode, start in clips[begin : begin + _BATCH]])
        with torch.inference_mode(), native.autocast(precision):
            codes_BTNC = tokenizer.encode(native.to_unit_frames(batch_BTHWC))
        found.append(codes_BTNC.flatten(0, 1).cpu().numpy().astype("<u2"))
    return np.split(np.concatenate(found), np.cumsum(counts) * clip)[:-1]
