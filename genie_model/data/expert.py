"""Expert CoinRun play for behavioural cloning (App. E, Figure 15).

The expert plans: Procgen saves and restores its states, so a search through the simulator itself finds the way.
`python -m genie_model.data.expert --mode hard` shows how often it does, beside the random policy.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from genie_model.data.coinrun import FRAME_SHAPE, Mode, ProcgenGym3Env, agent, enter_levels, simulator
from genie_model.data.play import check, held_out_levels, play_levels, random_policy, training_levels
from genie_model.data.shards import Meta, compress, has_index, missing_shards, write_index, write_shard
from genie_model.data.store import VideoStore
from genie_model.progress import NoLog, RunLog, bar, summary

BUDGET = 50_000  # simulator steps; of 2,000 hard levels one took more than 40,000, and half of them fewer than 400
_LEFT, _LEFT_UP, _STAY, _UP, _RIGHT, _RIGHT_UP = 1, 2, 4, 5, 7, 8  # the others do the same, or drop through crates
_MOVES = (_RIGHT, _RIGHT_UP, _STAY, _UP, _LEFT, _LEFT_UP)  # of equals the first wins
_HOLD = 4  # steps that a move is held
_TRY = len(_MOVES) * _HOLD  # simulator steps that trying every move takes
_SEARCHES = 10  # levels searched at a time
_REPLAYS = 64  # levels replayed at a time
_STEPS_PER_CELL = 2.0  # running, the agent makes half a cell a step
_GREED = 2.0  # 1.2 finds ways that are 5% shorter, but searches four times as long
_CHANGE = 1.0  # steps' worth that a change of buttons costs: a player does not fidget
_SEEDS = 5  # of the random policy
_PHASE = 16  # steps; monsters walk, so the same place is another one this much later


@dataclass(frozen=True)
class Solution:
    """`actions` is int32 (T,), of which the last takes the coin, or None where the budget was too small."""

    actions: NDArray[np.int32] | None
    simulator_steps: int


def solve(
    levels: Sequence[int], mode: Mode, budget: int = BUDGET, advance: Callable[[int], object] = lambda levels: None
) -> list[Solution]:
    """A way to the coin of each level (seeds), as short as a player's; it depends on the level, mode and budget alone.

    `budget` bounds a level's simulator steps: two cores make about 10,000 a second, saving and restoring included.
    `advance` is told how many levels are done with. Every way has been replayed from its level's start. Raises
    ValueError for an unknown mode, no levels or a budget that is too small to begin with.
    """
    check(levels, mode)
    if budget < _TRY:
        raise ValueError(f"budget={budget}: at least {_TRY} simulator steps")
    env = simulator(min(_SEARCHES, len(levels)) * len(_MOVES), mode)
    try:
        searches = [_Search(start, budget) for start in _starts(env, levels)]
        waiting = iter(searches)
        running = list(itertools.islice(waiting, _SEARCHES))
        while running:
            _try_all_moves(env, running)
            unfinished = [search for search in running if not search.over]
            advance(len(running) - len(unfinished))
            running = [*unfinished, *itertools.islice(waiting, _SEARCHES - len(unfinished))]
    finally:
        env.close()
    found = {
        level: search.actions for level, search in zip(levels, searches, strict=True) if search.actions is not None
    }
    for begin in range(0, len(found), _REPLAYS):
        _replay(dict(itertools.islice(found.items(), begin, begin + _REPLAYS)), mode)
    return [Solution(search.actions, search.simulator_steps) for search in searches]


def collect_demonstrations(
    num_levels: int,
    mode: Mode,
    root_uri: str,
    budget: int = BUDGET,
    levels_per_shard: int = 64,
    log: RunLog = NoLog(),  # noqa: B008
) -> str:
    """Records the expert on the first training levels; the URI is <root_uri>/datasets/coinrun-expert-<mode>-<digest>.

    A store as `collect` makes it, one episode per solved level in order of level, and as `collect` it carries on where
    it was interrupted. An episode ends on the frame from which the coin is taken; only the truth's own file has the
    action that takes it. The levels of a shard are replayed side by side. Raises ValueError as `solve` does.
    """
    data = {"levels": num_levels, "mode": mode, "budget": budget, "levels_per_shard": levels_per_shard}
    levels = training_levels(num_levels)
    check(levels, mode)
    if levels_per_shard < 1:
        raise ValueError(f"levels_per_shard={levels_per_shard}: at least 1")
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]
    uri = f"{root_uri.rstrip('/')}/datasets/coinrun-expert-{mode}-{digest}"
    shards = [levels[begin : begin + levels_per_shard] for begin in range(0, num_levels, levels_per_shard)]
    missing = missing_shards(uri, len(shards))
    if missing:
        with bar(desc="collect expert", unit="level", total=sum(len(shards[shard]) for shard in missing)) as progress:
            for shard in missing:
                _collect_shard(uri, shard, shards[shard], mode, budget, progress.update)
    if missing or not has_index(uri):
        meta: Meta = {"source": "coinrun", "split": "train", "frame_shape": list(FRAME_SHAPE), "data": data}
        write_index(uri, len(shards), meta)
    store = VideoStore.open(uri)
    what = f"{store.num_frames:,} frames, {store.num_episodes:,} of {num_levels:,} levels solved, {uri}"
    summary("collect expert", f"{'collected' if missing else 'reused'}: {what}")
    log.params({"demonstrations_uri": uri, "demonstrations_digest": store.digest})
    log.metrics({"demonstrations_solved": store.num_episodes / num_levels, "demonstrations_frames": store.num_frames})
    return uri


def _collect_shard(
    uri: str, shard: int, levels: range, mode: Mode, budget: int, advance: Callable[[int], object]
) -> None:
    found = zip(levels, solve(levels, mode, budget, advance), strict=True)
    solved = {level: solution.actions for level, solution in found if solution.actions is not None}
    episodes = [compress(frames_THWC) for frames_THWC in _replay(solved, mode)]
    truth = {
        "level_seed": np.array([*solved], np.int64),
        "action": np.concatenate([np.empty(0, np.int32), *solved.values()]),
    }
    write_shard(uri, shard, episodes, FRAME_SHAPE, truth)


class _Node(NamedTuple):
    parent: _Node | None
    move: int  # that led here from the parent
    steps: int  # from the level's start
    cost: float  # those, and the changes of buttons


class _Search:
    """Best-first search (weighted A*) through one level's states, each kept once per place, speed and phase of time."""

    def __init__(self, start: bytes, budget: int) -> None:
        self.actions: NDArray[np.int32] | None = None
        self.simulator_steps = 0
        self._budget = budget
        self._node = _Node(None, _RIGHT, 0, 0.0)
        self._serial = itertools.count()  # among equals the older goes first
        self._frontier = [(0.0, next(self._serial), self._node, start)]
        self._seen: set[tuple[int, ...]] = set()

    @property
    def over(self) -> bool:
        return self.actions is not None or not self._frontier or self.simulator_steps + _TRY > self._budget

    def pop(self) -> bytes:
        """The most promising state, to try all moves in."""
        _, _, self._node, state = heapq.heappop(self._frontier)
        self.simulator_steps += _TRY
        return state

    def lived(self, move: int, state: bytes) -> None:
        """The move, held for _HOLD steps, led to this state."""
        x, y, vx, vy = agent(state)
        steps = self._node.steps + _HOLD
        place = (round(2 * x), round(2 * y), round(4 * vx), round(2 * vy), steps // _PHASE)
        if place in self._seen:
            return
        self._seen.add(place)
        cost = self._node.cost + _HOLD + _CHANGE * (move != self._node.move)
        # The coin is a level's rightmost end: where exactly makes no difference between two states.
        priority = cost - _GREED * _STEPS_PER_CELL * float(x)
        heapq.heappush(self._frontier, (priority, next(self._serial), _Node(self._node, move, steps, cost), state))

    def won(self, move: int, steps: int) -> None:
        """The move took the coin after that many steps."""
        moves = [[move] * steps]
        node = self._node
        while node.parent is not None:
            moves.append([node.move] * _HOLD)
            node = node.parent
        self.actions = np.array(list(itertools.chain.from_iterable(reversed(moves))), np.int32)
        self._frontier.clear()


def _try_all_moves(env: ProcgenGym3Env, searches: Sequence[_Search]) -> None:
    """Each search's most promising state gets a simulator for every move."""
    states = [state for search in searches for state in [search.pop()] * len(_MOVES)]
    lanes = list(itertools.product(searches, _MOVES))
    env.callmethod("set_state", states + states[:1] * (env.num - len(lanes)))
    action_B = np.resize(np.array(_MOVES, np.int32), env.num)
    alive_B = np.arange(env.num) < len(lanes)
    for step in range(_HOLD):
        env.act(action_B)
        reward_B, _, first_B = env.observe()
        for lane in np.flatnonzero(alive_B & (reward_B > 0)):
            search, move = lanes[lane]
            if search.actions is None:
                search.won(move, step + 1)
        alive_B &= ~first_B
    for (search, move), state, alive in zip(lanes, env.callmethod("get_state"), alive_B, strict=False):
        if alive and search.actions is None:
            search.lived(move, state)


def _starts(env: ProcgenGym3Env, levels: Sequence[int]) -> Iterator[bytes]:
    """Each level's first state."""
    for begin in range(0, len(levels), env.num):
        part = levels[begin : begin + env.num]
        enter_levels(env, [*part, *[part[0]] * (env.num - len(part))])
        yield from env.callmethod("get_state")[: len(part)]


def _replay(ways: dict[int, NDArray[np.int32]], mode: Mode) -> list[NDArray[np.uint8]]:
    """Plays each level (seed: actions (T,)) from its own start; what the player sees before each action, (T, H, W, 3).

    Raises RuntimeError unless all reach the coin with their last action.
    """
    if not ways:
        return []
    lengths = [len(actions) for actions in ways.values()]
    action_BT = np.full((len(ways), max(lengths)), _STAY, np.int32)
    for row_T, actions in zip(action_BT, ways.values(), strict=True):
        row_T[: len(actions)] = actions
    seen: list[list[NDArray[np.uint8]]] = [[] for _ in ways]
    steps = iter(action_BT.T)

    def policy(frames_BHWC: NDArray[np.uint8], done_B: NDArray[np.bool_]) -> NDArray[np.int32]:
        for frames, frame_HWC, done in zip(seen, frames_BHWC, done_B, strict=True):
            if not done:
                frames.append(frame_HWC)
        return next(steps)

    solved_B = play_levels(policy, [*ways], mode, max(lengths))
    if not solved_B.all() or [len(frames) for frames in seen] != lengths:
        raise RuntimeError("Procgen did not repeat what was found: it no longer restores states exactly")
    return [np.stack(frames) for frames in seen]


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 2 after one line for what cannot be."""
    parser = argparse.ArgumentParser(prog="python -m genie_model.data.expert", description=__doc__)
    parser.add_argument("--levels", type=int, default=100, help="held-out levels (default: 100)")
    parser.add_argument("--mode", default="hard", help=f"one of {', '.join(get_args(Mode))} (default: hard)")
    parser.add_argument("--budget", type=int, default=BUDGET, help=f"simulator steps per level (default: {BUDGET})")
    args = parser.parse_args(arguments)
    try:
        levels = held_out_levels(args.levels)
        check(levels, args.mode)
        started = time.perf_counter()
        with bar(desc="solve", unit="level", total=args.levels) as progress:
            found = solve(levels, args.mode, args.budget, progress.update)
        seconds = (time.perf_counter() - started) / args.levels
    except ValueError as error:
        print(f"genie_model.data.expert: {error}", file=sys.stderr)
        return 2
    shares = [
        play_levels(random_policy(seed), levels, args.mode).mean()
        for seed in bar(range(_SEEDS), desc="random policy", unit="seed")
    ]
    runner = play_levels(lambda frames_BHWC, done_B: np.full(len(done_B), _RIGHT_UP), levels, args.mode).mean()
    lengths = [len(way.actions) for way in found if way.actions is not None] or [0]
    used = [way.simulator_steps for way in found]
    solved = sum(way.actions is not None for way in found) / len(found)
    print(f"{args.levels} held-out {args.mode} levels      median    mean     max")
    print(f"expert solves            {solved:7.1%}")
    print(f"  steps to the coin      {np.median(lengths):7,.0f} {np.mean(lengths):7,.0f} {max(lengths):7,.0f}")
    print(f"  simulator steps        {np.median(used):7,.0f} {np.mean(used):7,.0f} {max(used):7,.0f}")
    print(f"  seconds                        {seconds:7.2f}")
    print(f"RIGHT and UP held solves {runner:7.1%}")
    print(f"random policy solves     {np.mean(shares):7.1%}  ({', '.join(f'{share:.0%}' for share in shares)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
