"""The expert reaches the coin from each level's own start, recordings are what it did, and play_levels counts right."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest

from genie_model.data.coinrun import ProcgenGym3Env
from genie_model.data.expert import collect_demonstrations, main, solve
from genie_model.data.play import held_out_levels, play_levels, random_policy, training_levels
from genie_model.data.store import VideoStore
from genie_model.data.truth import PrivilegedTruth

LEVELS = 5
RIGHT, RIGHT_UP, STAY = 7, 8, 4


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def replay(level, mode, actions):
    """Frames, rewards and episode starts of a simulator that was made for this level alone."""
    env = ProcgenGym3Env(
        num=1, env_name="coinrun", distribution_mode=mode, num_levels=1, start_level=level, num_threads=0, rand_seed=99
    )
    seen = [env.observe()]
    for action in actions:
        env.act(np.array([action], np.int32))
        seen.append(env.observe())
    env.close()
    return np.stack([frame["rgb"][0] for _, frame, _ in seen]), [r[0] for r, _, _ in seen], [f[0] for _, _, f in seen]


def script(plans):
    """A policy that plays level i's actions plans[i] and then stays where it is."""
    steps = itertools.count()

    def policy(frames_BHWC, done_B):
        t = next(steps)
        return np.array([plan[t] if t < len(plan) else STAY for plan in plans])

    return policy


@pytest.fixture(scope="module")
def ways():
    """The actions to the coin of easy levels 0..4."""
    return [solution.actions for solution in solve(range(LEVELS), "easy")]


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    return collect_demonstrations(LEVELS, "easy", str(tmp_path_factory.mktemp("demonstrations")), levels_per_shard=2)


def assert_the_last_action_takes_the_coin(level, mode, actions):
    _, rewards, firsts = replay(level, mode, actions)
    assert rewards[1:] == [0] * (len(actions) - 1) + [10]
    assert firsts == [True] + [False] * (len(actions) - 1) + [True]


def test_every_easy_level_is_solved_from_its_own_start(ways):
    for level, actions in enumerate(ways):
        assert_the_last_action_takes_the_coin(level, "easy", actions)


def test_a_hard_level_with_monsters_is_solved_too():
    (solution,) = solve([11], "hard")
    assert_the_last_action_takes_the_coin(11, "hard", solution.actions)


def test_a_way_is_no_random_walk(ways):
    for actions in ways:
        assert len(actions) < 150
        assert np.isin(actions, [RIGHT, RIGHT_UP]).mean() > 0.5
        assert np.count_nonzero(np.diff(actions)) < len(actions) / 3


def test_a_way_does_not_depend_on_the_company(ways):
    for level, solution in zip([3, 1], solve([3, 1], "easy"), strict=True):
        assert np.array_equal(solution.actions, ways[level])


def test_the_budget_is_kept():
    full = solve(range(LEVELS), "easy")
    budget = int(np.median([solution.simulator_steps for solution in full]))
    for solution, cut in zip(full, solve(range(LEVELS), "easy", budget), strict=True):
        assert cut.simulator_steps <= budget
        assert (cut.actions is None) == (solution.simulator_steps > budget)


def test_progress_counts_every_level():
    told = []
    solve(range(12), "easy", 200, told.append)
    assert sum(told) == 12


def test_recorded_frames_follow_from_the_recorded_actions(demonstrations, ways):
    store, truth = VideoStore.open(demonstrations), PrivilegedTruth.open(demonstrations)
    store.verify()
    assert store.episode_lengths.tolist() == [len(actions) for actions in ways]
    for level, actions in enumerate(ways):
        episode = truth.episode(level)
        assert episode["level_seed"] == level
        assert np.array_equal(episode["action"], actions[:-1])
        shown, _, firsts = replay(level, "easy", episode["action"])
        assert np.array_equal(store.frames(level, 0, len(actions)), shown)
        assert firsts == [True] + [False] * (len(actions) - 1)


def test_what_was_interrupted_carries_on_to_the_same_bytes(demonstrations, tmp_path, capsys):
    folder = tmp_path / "datasets" / demonstrations.rsplit("/", 1)[-1]
    shutil.copytree(demonstrations, folder)
    (folder / "index.json").unlink()
    (folder / "shard-00002.json").unlink()
    tar = folder / "shard-00001.tar"
    tar.write_bytes(tar.read_bytes()[:100])
    untouched = (folder / "shard-00000.tar").stat().st_mtime_ns
    assert collect_demonstrations(LEVELS, "easy", str(tmp_path), levels_per_shard=2) == str(folder)
    assert "collected: " in capsys.readouterr().out
    assert files(folder) == files(demonstrations)
    assert (folder / "shard-00000.tar").stat().st_mtime_ns == untouched
    collect_demonstrations(LEVELS, "easy", str(tmp_path), levels_per_shard=2)
    assert "reused: " in capsys.readouterr().out


def test_levels_that_the_budget_does_not_solve_are_left_out(tmp_path):
    solutions = solve(range(LEVELS), "easy")
    budget = min(solution.simulator_steps for solution in solutions)
    uri = collect_demonstrations(LEVELS, "easy", str(tmp_path), budget, levels_per_shard=1)
    truth = PrivilegedTruth.open(uri)
    solved = [level for level in range(LEVELS) if solutions[level].simulator_steps == budget]
    assert 0 < len(solved) < LEVELS
    assert [truth.episode(i)["level_seed"] for i in range(VideoStore.open(uri).num_episodes)] == solved


def test_play_solves_exactly_the_levels_whose_actions_it_has(ways):
    plans = [actions if level in (0, 2, 3) else [] for level, actions in enumerate(ways)]
    assert play_levels(script(plans), range(LEVELS), "easy", 200).tolist() == [True, False, True, True, False]


def test_play_stops_at_max_steps(ways):
    assert play_levels(script([ways[0]]), [0], "easy", len(ways[0])).tolist() == [True]
    assert play_levels(script([ways[0]]), [0], "easy", len(ways[0]) - 1).tolist() == [False]


def test_a_coin_in_the_second_life_does_not_count(ways):
    plan, lives = iter(ways[0]), []

    def policy(frames_BHWC, done_B):
        lives.append(done_B[0])
        # Level 1 waits throughout: it keeps the play going when level 0 has ended.
        return np.array([next(plan, STAY) if done_B[0] else RIGHT_UP, STAY])

    assert play_levels(policy, [0, 1], "easy", 300).tolist() == [False, False]
    assert sum(lives) > len(ways[0])
    assert next(plan, None) is None


def test_a_policy_sees_its_own_level(ways):
    shown = []

    def policy(frames_BHWC, done_B):
        shown.append(frames_BHWC)
        return np.full(2, STAY)

    play_levels(policy, [3, 1_000_000], "hard", 2)
    for i, level in enumerate([3, 1_000_000]):
        assert np.array_equal(np.stack(shown)[:, i], replay(level, "hard", [STAY])[0])


def test_the_random_policy_is_uniform_and_seeded():
    frames, done = np.zeros((3000, 64, 64, 3), np.uint8), np.zeros(3000, bool)
    drawn = random_policy(0)(frames, done)
    assert np.bincount(drawn, minlength=15).min() > 100
    assert np.array_equal(drawn, random_policy(0)(frames, done))
    assert not np.array_equal(drawn, random_policy(1)(frames, done))


def test_no_level_is_for_training_and_held_out():
    assert not set(training_levels(10_000)) & set(held_out_levels(10_000))
    with pytest.raises(ValueError, match=r"1 to 10000"):
        training_levels(10_001)
    with pytest.raises(ValueError, match="at least 1"):
        held_out_levels(0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda root: solve([0], "medium"), "mode 'medium': one of easy, hard"),
        (lambda root: solve([], "easy"), "no levels: at least one"),
        (lambda root: solve([0], "easy", 1), "budget=1: at least 24 simulator steps"),
        (lambda root: play_levels(random_policy(0), [0], "extreme"), "mode 'extreme': one of easy, hard"),
        (lambda root: play_levels(random_policy(0), [], "easy"), "no levels: at least one"),
        (lambda root: play_levels(lambda frames, done: [15], [0], "easy"), r"1 actions of 0\.\.14, not \[15\]"),
        (lambda root: play_levels(lambda frames, done: [0, 0], [0], "easy"), r"1 actions of 0\.\.14, not \[0 0\]"),
        (lambda root: collect_demonstrations(1, "medium", root), "mode 'medium': one of easy, hard"),
        (lambda root: collect_demonstrations(0, "easy", root), "0 training levels: 1 to 10000"),
        (lambda root: collect_demonstrations(1, "easy", root, levels_per_shard=0), "levels_per_shard=0: at least 1"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(call, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        call(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_command_prints_how_often_each_policy_solves(capsys):
    assert main(["--levels", "2", "--mode", "easy"]) == 0
    table = capsys.readouterr().out
    assert "expert solves             100.0%" in table
    assert "random policy solves" in table
    assert main(["--mode", "medium"]) == 2
    assert capsys.readouterr().err == "genie_model.data.expert: mode 'medium': one of easy, hard\n"
