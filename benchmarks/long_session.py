"""Plays one long session: time and memory a frame, and what it looks like. Writes a picture and a JSON file.

    python -m benchmarks.long_session MODEL_FOLDER [--frames 2000] [--worlds 4] [--like DATA] [--out build/long_session]

The worlds start from the model's held-out start frames. A random action is held for 8 frames, as in demo's data.

With --like they start as the longest held-out episodes of that data set do, and take the latent actions that the LAM
sees in them, then those of the next longest ones: a session as it was really played, in which who jumps comes down
again. The picture shows the real frames above the dreamt ones; the real end first (CoinRun's after 1,000 frames).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.__main__ import machine
from genie_model import metrics, pictures
from genie_model.checkpoint import load_config, load_model
from genie_model.data.held_out import Frames, HeldOut
from genie_model.genie import Genie
from genie_model.progress import bar
from genie_model.video_features import Random3DFeatures

SHOWN = (1, 16, 50, 100, 250, 500, 1000, 2000)
HELD = 8
_LAST, _CLIP = 64, 16  # frames up to one that is shown, of which distances are measured, and of a clip of them
_MORE = "hold out more: data.eval_levels or data.eval_steps_per_level of CoinRun, ingest.eval_share of video"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.long_session",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a folder with config.json, model.safetensors and start_frames/")
    parser.add_argument("--frames", type=_positive, default=2000)
    parser.add_argument("--worlds", type=_positive, default=4)
    parser.add_argument("--like", metavar="DATA", help="a data set, whose held-out episodes are played again")
    parser.add_argument(
        "--set", dest="overrides", nargs="*", action="extend", default=[], help="e.g. sampling.maskgit_steps=4"
    )
    parser.add_argument("--out", type=Path, default=Path("build/long_session"))
    arguments = parser.parse_args()
    real: list[Frames] = []
    try:
        config = load_config(arguments.model).with_overrides(*arguments.overrides)
        genie = load_model(arguments.model, config.sampling)
        if arguments.like is not None:
            held_out = HeldOut.open(f"{arguments.like.rstrip('/')}/eval", config.evaluation.clips, config.frame_shape)
            real, actions_BT = played_before(genie, held_out, arguments.worlds, arguments.frames)
            starts = [frames_THWC[0] for frames_THWC in real]
        else:
            starts = start_frames(arguments.model, arguments.worlds)
            actions_BT = random_actions(genie, len(starts), arguments.frames)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)  # not after all was played
    except (ValueError, OSError) as error:
        parser.error(str(error))
    prompt_BTHWC = np.stack(starts)[:, None]
    process, seen, seconds, memory = psutil.Process(), {0: prompt_BTHWC[:, 0]}, [], []
    last, ends = deque[Frames](maxlen=_LAST), {}
    for t, (took, frame_BHWC) in enumerate(play(genie, prompt_BTHWC, actions_BT), 1):
        seconds.append(took)
        memory.append(process.memory_info().rss / 2**20)
        last.append(frame_BHWC)
        if t in SHOWN:
            seen[t] = frame_BHWC
            if real and t >= _LAST:
                ends[t] = np.stack(last, 1)
    tenth = max(arguments.frames // 10, 1)
    found = {
        **machine(),
        "worlds": len(starts),
        "frames": arguments.frames,
        "frame_ms_by_tenth": [1e3 * statistics.median(seconds[i : i + tenth]) for i in range(0, len(seconds), tenth)],
        "memory_mb_by_tenth": [max(memory[i : i + tenth]) for i in range(0, len(memory), tenth)],
        # how unlike neighbouring pixels are, beside the prompt's: falls to 0 as a picture becomes one colour
        "detail_over_prompt": {t: detail(frame_BHWC) / detail(seen[0]) for t, frame_BHWC in seen.items()},
    }
    if real:
        found["beside_real"] = beside_real(real, ends)
    Image.fromarray(table(seen, real)).save(arguments.out.with_suffix(".png"))
    arguments.out.with_suffix(".json").write_text(json.dumps(found, indent=2))
    print(json.dumps(found, indent=2))


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def start_frames(model: str, worlds: int) -> list[Frames]:
    """Each (H, W, 3). Raises ValueError where there are none."""
    paths = sorted(Path(model, "start_frames").glob("*.png"))[:worlds]
    if not paths:
        raise ValueError(f"no start frames in {model}: evaluate the model first, it writes them")
    return [np.asarray(Image.open(path).convert("RGB")) for path in paths]


def random_actions(genie: Genie, worlds: int, frames: int) -> NDArray[np.int64]:
    """(B, frames), each held for HELD of them."""
    drawn_KB = np.random.default_rng(0).integers(genie.config.num_actions, size=(-(-frames // HELD), worlds))
    return drawn_KB.repeat(HELD, 0)[:frames].T


def played_before(genie: Genie, held_out: HeldOut, worlds: int, frames: int) -> tuple[list[Frames], NDArray[np.int64]]:
    """The longest episode of each of so many levels, and the latent actions (B, frames): its own, then of other ones.

    Raises ValueError where there are too few, or too short ones to compare with.
    """
    turns, ranked = Counter[int](), []  # (how many longer ones of its level there are, its frames)
    for episode in sorted(held_out.episodes, key=lambda episode: -len(episode.frames_THWC)):
        ranked.append((turns[episode.level], episode.frames_THWC))
        turns[episode.level] += 1
    ranked.sort(key=itemgetter(0))
    own = [[frames_THWC for _, frames_THWC in ranked[i::worlds]] for i in range(worlds)]
    have = min(sum(len(frames_THWC) - 1 for frames_THWC in episodes) for episodes in own)
    if len(turns) < worlds or have < frames:
        raise ValueError(
            f"{held_out.uri} has {len(turns)} levels, or videos, and {have} steps for each world, not {worlds} and "
            f"{frames}: ask for fewer --worlds or --frames, or {_MORE}"
        )
    if sum(len(episodes[0]) // _CLIP for episodes in own) < 2:
        raise ValueError(
            f"the longest episodes of {held_out.uri} have {len(own[0][0])} frames, too few for two clips of {_CLIP} to "
            f"compare with: ask for more --worlds, or {_MORE}"
        )
    actions_BT = []
    for episodes in own:
        taken_T = np.empty(0, np.int64)
        for frames_THWC in episodes:
            if len(taken_T) < frames:
                taken_T = np.concatenate([taken_T, latent_actions(genie, frames_THWC)])
        actions_BT.append(taken_T[:frames])
    return [episodes[0] for episodes in own], np.stack(actions_BT)


def latent_actions(genie: Genie, frames_THWC: Frames) -> NDArray[np.int64]:
    """(T - 1), as the LAM sees them in clips of the length it was trained on."""
    stride = genie.config.data.clip_length - 1
    clips = [frames_THWC[None, t : t + stride + 1] for t in range(0, len(frames_THWC) - 1, stride)]
    return np.concatenate([genie.infer_actions(torch.from_numpy(clip.copy()))[0].numpy() for clip in clips])


def play(genie: Genie, prompt_BTHWC: Frames, actions_BT: NDArray[np.int64]) -> Iterator[tuple[float, Frames]]:
    """The seconds that each frame took, and the frames (B, H, W, 3)."""
    state = genie.start(torch.from_numpy(prompt_BTHWC), seed=range(len(prompt_BTHWC)))
    for action_B in bar(np.ascontiguousarray(actions_BT.T), desc="play", unit="frame"):
        began = time.perf_counter()
        frame_BHWC = genie.step(state, torch.from_numpy(action_B)).numpy()
        yield time.perf_counter() - began, frame_BHWC


def beside_real(real: list[Frames], ends: dict[int, Frames]) -> dict[int, dict[str, float]]:
    """What the dreamt frames up to t, `ends` (B, T, H, W, 3), look like, and the real ones where all still went on.

    `fvd_random3d` is to all clips of the real episodes; few clips are far from many, those of the real ends too.
    """
    features = Random3DFeatures()
    all_real = features(_clips(real))
    found = {}
    for t, dreamt_BTHWC in ends.items():
        found[t] = _looks(_clips(dreamt_BTHWC), all_real, features)
        if all(len(frames_THWC) > t for frames_THWC in real):
            own = _looks(_clips([frames_THWC[t - _LAST + 1 : t + 1] for frames_THWC in real]), all_real, features)
            found[t] |= {f"{name}_of_real": value for name, value in own.items()}
    return found


def _looks(clips_BTHWC: Frames, all_real: NDArray[np.float64], features: Random3DFeatures) -> dict[str, float]:
    motion = np.abs(np.diff(clips_BTHWC.astype(np.int16), axis=1)).mean()
    distance = metrics.frechet_distance(all_real, features(clips_BTHWC))
    return {"fvd_random3d": float(distance), "detail": detail(clips_BTHWC[:, -1]), "motion": float(motion)}


def _clips(videos_BTHWC: Iterable[Frames]) -> Frames:
    """(K, _CLIP, H, W, 3), of each video one after another."""
    cut = [video[: len(video) // _CLIP * _CLIP].reshape(-1, _CLIP, *video.shape[1:]) for video in videos_BTHWC]
    return np.concatenate(cut)


def table(seen: dict[int, Frames], real: list[Frames]) -> pictures.Picture:
    """The frames (B, H, W, 3) of each t, below the real ones if any; grey where those are over."""
    rows = {}
    for i, dreamt_RHWC in enumerate(np.stack(list(seen.values()), 1)):
        if real:
            over_HWC = np.full_like(dreamt_RHWC[0], 128)
            rows[f"{i + 1} real"] = np.stack([real[i][t] if t < len(real[i]) else over_HWC for t in seen])
        rows[f"{i + 1} dreamt" if real else f"{i + 1}"] = dreamt_RHWC
    return pictures.frame_table(np.stack(list(rows.values())), [*rows], [f"frame {t}" for t in seen])


def detail(frames_BHWC: Frames) -> float:
    frames = frames_BHWC.astype(np.float32)
    return float(np.abs(np.diff(frames, axis=1)).mean() + np.abs(np.diff(frames, axis=2)).mean())


if __name__ == "__main__":
    main()
