"""What really happened in the recorded episodes. For evaluation, and for the oracle of behavioural cloning (App. E).

Nothing else on the training path imports this.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from fsspec.core import url_to_fs
from numpy.typing import NDArray

from genie_model.data.shards import Index, read_index


class PrivilegedTruth:
    """True actions and level seeds of every episode; on the eval split also where the agent was."""

    def __init__(self, uri: str, index: Index) -> None:
        self.uri = uri
        self._fs, self._root = url_to_fs(uri)
        self._shards = index["shards"]
        self._place = [(i, j) for i, shard in enumerate(self._shards) for j in range(len(shard["episodes"]))]
        self._tables: dict[int, dict[str, NDArray[Any]]] = {}

    @classmethod
    def open(cls, uri: str) -> PrivilegedTruth:
        """`uri` is a VideoStore's; episodes have the same numbers. Raises ValueError when there is no such data set."""
        return cls(uri, read_index(uri)[0])

    def episode(self, episode: int) -> dict[str, Any]:
        """`level_seed`: int; `action`: int32 (T-1,), action[t] leads from frame t to frame t+1. On the eval split also
        `agent_x`, `agent_y` (grid cells, y upwards) and `agent_vx`, `agent_vy` (cells per step): float32 (T,).
        Raises ValueError when the file that holds them is gone."""
        shard, number = self._place[episode]
        lengths = np.array([entry["num_frames"] for entry in self._shards[shard]["episodes"]])
        start, stop = lengths[:number].sum(), lengths[: number + 1].sum()
        table = self._table(shard)
        # Every per-frame column has a row for the last frame too; no action leads on from it within the episode.
        columns = {name: column[start:stop] for name, column in table.items() if name != "level_seed"}
        columns["action"] = columns["action"][:-1]
        return {"level_seed": int(table["level_seed"][number]), **columns}

    def _table(self, shard: int) -> dict[str, NDArray[Any]]:
        if shard not in self._tables:
            truth = self._shards[shard]["truth"]
            try:
                data = self._fs.cat_file(f"{self._root}/{truth['name']}")
            except FileNotFoundError:
                data = b""
            if len(data) != truth["bytes"]:
                raise ValueError(
                    f"{self.uri}/{truth['name']} is missing or truncated: run collect again, it remakes only that"
                )
            with np.load(io.BytesIO(data), allow_pickle=False) as table:
                self._tables[shard] = dict(table)
        return self._tables[shard]
