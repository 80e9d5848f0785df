"""A data set as video is ingested to: some videos show a game that scrolls, the others a menu that stands still."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from genie_model.config import Config
from genie_model.data.codecs import compress
from genie_model.data.labels import Label, write_labels
from genie_model.data.shards import write_index, write_shard
from genie_model.data.store import VideoStore
from genie_model.presets import get_preset

SIDE, LENGTH = 32, 12
CONFIG = get_preset("tiny").with_overrides(
    f"data.frame_height={SIDE}",
    f"data.frame_width={SIDE}",
    "data.clip_length=8",
    "curation.frames=2",
    "curation.width=8",
    "curation.steps=30",
    "curation.batch_size=8",
    "curation.held_out=0.3",
)


def is_good(video: int) -> bool:
    return video % 2 == 1


def clip(video: int, number: int) -> np.ndarray:
    """uint8 (T, H, W, 3)."""
    random = np.random.default_rng((video, number))
    if is_good(video):
        wide = random.integers(0, 256, (SIDE // 4, SIDE, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        return np.stack([wide[:, 2 * t : 2 * t + SIDE] for t in range(LENGTH)])
    frame = np.full((SIDE, SIDE, 3), random.integers(0, 40, 3), np.uint8)
    for row in range(6, SIDE - 4, 8):
        frame[row : row + 2, 4 : int(random.integers(16, 28))] = 230
    return np.stack([frame] * LENGTH)


def write_videos(uri: str, videos: Sequence[int], clips: int = 3) -> str:
    """A shard each; train and eval alike, for what they are told apart by is not curation's."""
    for split in ("train", "eval"):
        for shard, video in enumerate(videos):
            episodes = []
            for number in range(clips):
                frames = clip(video, number)
                about = {
                    "source": f"video-{video}.mp4",
                    "digest": hashlib.sha256(frames.tobytes()).hexdigest(),
                    "start_seconds": 1.2 * number,
                    "title": f"Video {video}",
                    "owner": f"owner {video // 2}",
                }
                episodes.append(compress(frames, about=about))
            write_shard(f"{uri}/{split}", shard, episodes, (SIDE, SIDE, 3))
        meta = {"source": "video", "split": split, "frame_shape": [SIDE, SIDE, 3], "data": {"fps": 10.0}}
        write_index(f"{uri}/{split}", len(videos), meta)
    return uri


def write_true_labels(uri: str, data_uri: str, config: Config = CONFIG, skip: int = 0) -> str:
    """5 and 1 for every clip behind the first `skip`, as a person would say."""
    store, labels = VideoStore.open(f"{data_uri}/train"), []
    for episode in range(skip, store.num_episodes):
        about = store.about(episode)
        good = is_good(int(about["source"].removeprefix("video-").removesuffix(".mp4")))
        labels.append(
            Label(**{key: about[key] for key in ("digest", "source", "start_seconds")}, label=5 if good else 1)
        )
    write_labels(uri, labels)
    return uri
