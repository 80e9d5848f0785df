"""What is recorded: the right levels, whole episodes, the very pixels, and the same bytes after any interruption."""

import itertools
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

import genie_model.files
from genie_model.data.coinrun import ProcgenGym3Env, collect, collect_shard, levels, random_actions
from genie_model.data.store import VideoStore
from genie_model.data.truth import PrivilegedTruth


def files(folder):
    """Without what a killed writer leaves."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".tmp"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def episodes(uri):
    """(frames, truth) of every episode."""
    store, truth = VideoStore.open(uri), PrivilegedTruth.open(uri)
    return [(store.frames(i, 0, n), truth.episode(i)) for i, n in enumerate(store.episode_lengths)]


def replay(level, actions):
    """Frames and episode starts from a simulator that was made for this level alone."""
    env = ProcgenGym3Env(
        num=1,
        env_name="coinrun",
        distribution_mode="hard",
        num_levels=1,
        start_level=level,
        num_threads=0,
        rand_seed=99,
    )
    _, observation, first = env.observe()
    frames, firsts = [observation["rgb"][0]], [first[0]]
    for action in actions:
        env.act(np.array([action], np.int32))
        _, observation, first = env.observe()
        frames.append(observation["rgb"][0])
        firsts.append(first[0])
    env.close()
    return np.stack(frames), firsts


@pytest.mark.parametrize("split", ["train", "eval"])
def test_every_level_is_recorded_once_in_full(recorded, recording_config, split):
    data = recording_config.data
    steps = data.steps_per_level if split == "train" else data.eval_steps_per_level
    recordings = episodes(f"{recorded}/{split}")
    visits = [level for level, _ in itertools.groupby(truth["level_seed"] for _, truth in recordings)]
    assert visits == list(levels(data, split))
    for level in visits:
        assert sum(len(frames) for frames, truth in recordings if truth["level_seed"] == level) == steps


def test_no_level_is_in_both_splits(recording_config):
    assert not set(levels(recording_config.data, "train")) & set(levels(recording_config.data, "eval"))


def test_stored_frames_are_what_procgen_shows_for_the_stored_actions(recorded):
    for split in ("train", "eval"):
        for frames, truth in episodes(f"{recorded}/{split}"):
            expected, firsts = replay(truth["level_seed"], truth["action"])
            assert np.array_equal(frames, expected)
            assert firsts == [True] + [False] * (len(frames) - 1)


def test_an_episode_ends_where_the_simulator_starts_anew(recorded, recording_config):
    restarts = 0
    for level, group in itertools.groupby(episodes(f"{recorded}/train"), key=lambda episode: episode[1]["level_seed"]):
        actions = random_actions(recording_config.data, "train", level, recording_config.data.steps_per_level)
        elapsed = 0
        for (frames, truth), (next_frames, _) in itertools.pairwise(group):
            elapsed += len(frames)
            shown, firsts = replay(level, [*truth["action"], actions[elapsed - 1]])
            assert firsts[-1]
            assert np.array_equal(shown[-1], next_frames[0])
            restarts += 1
    assert restarts >= 3  # or this recording tests nothing


def test_the_same_config_gives_the_same_bytes(recorded, recording_config, tmp_path):
    assert files(collect(recording_config, str(tmp_path))) == files(recorded)


def test_a_level_is_the_same_whatever_shard_it_is_in(recorded, recording_config, tmp_path):
    other = collect(recording_config.with_overrides("data.levels_per_shard=7"), str(tmp_path))
    for (frames, truth), (other_frames, other_truth) in zip(
        episodes(f"{recorded}/train"), episodes(f"{other}/train"), strict=True
    ):
        assert np.array_equal(frames, other_frames)
        assert np.array_equal(truth["action"], other_truth["action"])


def test_killed_at_every_write_it_carries_on_to_the_same_bytes(recorded, recording_config, tmp_path):
    status = None
    for writes in itertools.count(1):
        if not (child := os.fork()):
            collect_and_die_at_write(writes, recording_config, str(tmp_path))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert writes > 5
    (uri,) = (tmp_path / "datasets").iterdir()
    assert files(uri) == files(recorded)


def collect_and_die_at_write(number, config, root):
    """Runs in a child process: SIGKILL in the moment before the number-th file is renamed into place."""
    writes = itertools.count(1)
    sys.addaudithook(
        lambda event, _: event == "os.rename" and next(writes) == number and os.kill(os.getpid(), signal.SIGKILL)
    )
    try:
        collect(config, root)
        os._exit(0)
    finally:
        os._exit(1)


def test_workers_may_share_the_shards(recorded, recording_config, tmp_path):
    uri = f"{tmp_path}/datasets/{recorded.rsplit('/', 1)[-1]}"
    for shard in (2, 0):
        collect_shard(recording_config, "train", shard, uri)
    with pytest.raises(ValueError, match="unfinished: run collect"):
        VideoStore.open(f"{uri}/train")
    made = {name: content for name, content in files(uri).items() if "0000" in name}
    collect(recording_config, str(tmp_path))
    assert made.items() <= files(uri).items()
    assert files(uri) == files(recorded)


def test_a_finished_data_set_is_reused_and_says_so(copied, recording_config, capsys):
    root, folder = copied
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert collect(recording_config, root) == str(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times
    assert "[collect train] reused" in capsys.readouterr().out


@pytest.mark.parametrize("victim", ["shard-00001.tar", "truth-00001.npz", "shard-00001.json"])
def test_only_a_broken_shard_is_made_anew(copied, recorded, recording_config, victim):
    root, folder = copied
    untouched = (folder / "train" / "shard-00000.tar").stat().st_mtime_ns
    path = folder / "train" / victim
    path.write_bytes(path.read_bytes()[:100])
    collect(recording_config, root)
    assert files(folder) == files(recorded)
    assert (folder / "train" / "shard-00000.tar").stat().st_mtime_ns == untouched


def test_a_full_disk_keeps_what_is_made_and_says_what_to_do(recorded, recording_config, tmp_path, monkeypatch):
    monkeypatch.setattr(genie_model.files, "_temporary", lambda path: f"{path}.tmp")  # a name that is known
    uri = tmp_path / "datasets" / recorded.rsplit("/", 1)[-1]
    (uri / "train").mkdir(parents=True)
    full = uri / "train" / "shard-00001.tar.tmp"
    full.symlink_to("/dev/full")  # every write to it fails with ENOSPC
    with pytest.raises(OSError, match="free some space and run again"):
        collect(recording_config, str(tmp_path))
    assert (uri / "train" / "shard-00000.json").exists()
    assert not full.is_symlink()
    assert files(collect(recording_config, str(tmp_path))) == files(recorded)


def test_a_data_set_of_another_config_is_refused(copied, recording_config):
    root, folder = copied
    index = folder / "train" / "index.json"
    index.write_text(index.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(ValueError, match="another config"):
        collect(recording_config, root)


def test_procgen_renders_no_other_size(recording_config, tmp_path):
    with pytest.raises(ValueError, match=r"data\.frame_width=64"):
        collect(recording_config.with_overrides("data.frame_width=32"), str(tmp_path))


def test_the_policy_is_uniform_and_holds_its_actions_out_of_step(recording_config):
    data = recording_config.with_overrides("data.action_hold=8").data
    runs = np.stack([random_actions(data, "train", level, 400) for level in range(200)])
    counts = np.bincount(runs.ravel(), minlength=15) / runs.size
    assert np.abs(counts - 1 / 15).max() < 0.01
    phases = set()
    for run in runs:
        changes = np.flatnonzero(np.diff(run)) + 1
        assert len({change % 8 for change in changes.tolist()}) == 1
        phases.add(int(changes[0] % 8))
    assert phases == set(range(8))
    once = random_actions(recording_config.data, "train", 3, 400)
    assert np.mean(np.diff(once) != 0) > 0.85  # drawn anew each step: 14 of 15 changes show


def test_positions_follow_the_buttons(recorded):
    """RIGHT speeds x up, LEFT slows it down, and no step is longer than CoinRun's top speeds (0.5 across, 1.5 up)."""
    gain = {"left": [], "right": []}
    for frames, truth in episodes(f"{recorded}/eval"):
        assert len(truth["agent_x"]) == len(truth["agent_vy"]) == len(frames)
        assert truth["agent_x"][0] == 1.5  # where every level starts
        assert np.abs(np.diff(truth["agent_x"])).max() < 0.5 + 1e-3
        assert np.abs(np.diff(truth["agent_y"])).max() < 1.5 + 1e-3
        acceleration = np.diff(truth["agent_vx"])
        gain["left"] += acceleration[truth["action"] <= 2].tolist()
        gain["right"] += acceleration[(truth["action"] >= 6) & (truth["action"] <= 8)].tolist()
    assert np.mean(gain["left"]) < -0.01 < 0.01 < np.mean(gain["right"])


def test_positions_of_training_levels_are_not_kept(recorded):
    assert PrivilegedTruth.open(f"{recorded}/train").episode(0).keys() == {"level_seed", "action"}
