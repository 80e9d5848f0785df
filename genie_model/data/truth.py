"""What really happened in the recorded episodes. For evaluation, and for the oracle of behavioural cloning (App. E).

Nothing else on the training path imports this.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genie_model import files
from genie_model.data.shards import read_manifest
from genie_model.data.store import VideoStore


class PrivilegedTruth:
    """True actions and level seeds of every episode; on the eval split also where the agent was."""

    def __init__(self, store: VideoStore) -> None:
        self._store = store
        self._tables: dict[int, tuple[NDArray[np.int64], dict[str, NDArray[Any]]]] = {}

    @classmethod
    def open(cls, uri: str) -> PrivilegedTruth:
        """`uri` is a VideoStore's; episodes have the same numbers. Raises ValueError when there is no such data set."""
        return cls(VideoStore.open(uri))

    @property
    def is_known(self) -> bool:
        """Not of video: nobody wrote down what was done in it."""
        return "truth" in read_manifest(self._store.home, int(self._store.columns.shard[0]))

    def episode(self, episode: int) -> dict[str, Any]:
        """`level_seed`: int; `action`: int32 (T-1,), action[t] leads from frame t to frame t+1. On the eval split also
        `agent_x`, `agent_y` (grid cells, y upwards) and `agent_vx`, `agent_vy` (cells per step): float32 (T,).
        Raises ValueError when the file that holds them is gone, or when nobody knows what happened (video)."""
        shard, number = self._store.file_of(episode)
        if shard not in self._tables:
            self._tables[shard] = self._read(shard)
        ends_E, table = self._tables[shard]
        start, stop = int(ends_E[number - 1]) if number else 0, int(ends_E[number])
        # Every per-frame column has a row for the last frame too; no action leads on from it within the episode.
        columns = {name: column[start:stop] for name, column in table.items() if name != "level_seed"}
        columns["action"] = columns["action"][:-1]
        return {"level_seed": int(table["level_seed"][number]), **columns}

    def _read(self, shard: int) -> tuple[NDArray[np.int64], dict[str, NDArray[Any]]]:
        """Where the shard's episodes end in the table of its frames, and the table."""
        home = self._store.home
        manifest = read_manifest(home, shard)
        if "truth" not in manifest:
            raise ValueError(f"{home} is video: what was done in it is not known")
        name, size = manifest["truth"]["name"], manifest["truth"]["bytes"]
        data = files.read(f"{home}/{name}") if files.exists(f"{home}/{name}") else b""
        if len(data) != size:
            raise ValueError(f"{home}/{name} is missing or truncated: run collect again, it remakes only that")
        ends_E = np.cumsum([entry["num_frames"] for entry in manifest["episodes"]])
        with np.load(io.BytesIO(data), allow_pickle=False) as table:
            return ends_E, dict(table)
