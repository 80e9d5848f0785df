"""Makes ordinary video files of several Procgen games, with all the junk among them that people upload.

    python examples/make_videos.py make FOLDER             # a hundred files and FOLDER/manifest.csv, in two minutes
    python examples/make_videos.py label FOLDER DATA_URI LABELS

Good are the platformers (CoinRun, Climber, Jumper, Ninja), played at random. Under titles that promise the same lie
menu screens, streamers' faces, slide shows and other kinds of games; some videos begin with a menu. Other titles give
themselves away. And some files are broken: cut off, damaged, empty, sound alone, turned, HDR, uploaded twice, ...

FOLDER/made.json says what each second of each file shows. With that `label` marks clips of the data set that `ingest`
made of the folder, 5 (good) or 1 (bad): the maker's own knowledge, where a person would sit at the labelling page.

The same arguments give the same pictures.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import multiprocessing
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from genie_model.data.coinrun import ProcgenGym3Env
from genie_model.data.labels import BAD, GOOD, Label, write_labels
from genie_model.data.shards import write_view
from genie_model.data.store import VideoStore
from genie_model.progress import bar

PLATFORMERS = {"coinrun": "Coin Runner", "climber": "Star Climber", "jumper": "Carrot Jumper", "ninja": "Ninja Ledges"}
OTHERS = {"starpilot": "Star Pilot", "bigfish": "Big Fish", "maze": "Cheese Maze", "plunder": "Plunder Bay"}
ACTIONS = ("speedrun", "playthrough", "gameplay", "let's play", "walkthrough")
LICENCES = ("CC-BY-4.0", "CC0-1.0", "CC-BY-SA-4.0", "")
TICKS = 10  # game steps and drawn pictures a second; a recording repeats them up to its own rate
SIZE = 256  # pixels of a scene's picture, which is square
HELD = 8  # ticks at most that a random action is held for
CLIP = 16  # seconds
Picture = NDArray[np.uint8]  # (SIZE, SIZE, 3)


@dataclass(frozen=True)
class Scene:
    """`kind` is game, other, menu, face or slides; `game` is Procgen's name."""

    kind: str
    game: str
    seconds: int


@dataclass(frozen=True)
class Recording:
    """A file to be made; `broken` names its way of `_ODD`."""

    name: str
    title: str
    description: str
    owner: str
    licence: str
    scenes: tuple[Scene, ...]
    seed: int
    fps: int = 20
    broken: str = ""


# --- what is shown ---


def pictures(scene: Scene, seed: int) -> Iterator[Picture]:
    """TICKS a second."""
    rng = np.random.default_rng(seed)
    drawn = {"game": _play, "other": _play, "menu": _menu, "face": _face, "slides": _slides}[scene.kind](scene, rng)
    return itertools.islice(drawn, scene.seconds * TICKS)


def _play(scene: Scene, rng: np.random.Generator) -> Iterator[Picture]:
    """The game itself, in its large picture, under actions at random; a lost or won level gives way to the next."""
    level = int(rng.integers(1 << 30))
    mode = "hard" if scene.game == "coinrun" else "easy"  # CoinRun's easy levels all look alike
    options = {"distribution_mode": mode, "render_mode": "rgb_array", "num_threads": 1, "rand_seed": level}
    env = ProcgenGym3Env(num=1, env_name=scene.game, **options)
    while True:
        action = rng.integers(15, size=1, dtype=np.int32)
        for _ in range(rng.integers(2, HELD + 1)):
            large = env.get_info()[0]["rgb"]  # 512 x 512
            yield np.asarray(Image.fromarray(large).reduce(2))
            env.act(action)


def _menu(scene: Scene, rng: np.random.Generator) -> Iterator[Picture]:
    name = (PLATFORMERS | OTHERS)[scene.game]
    back, front = (tuple(int(c) for c in rng.integers(low, low + 90, 3)) for low in (20, 160))
    items = ["New game", "Continue", "Options", "Credits"]
    chosen = 0
    for tick in itertools.count():
        image = Image.new("RGB", (SIZE, SIZE), back)
        draw = ImageDraw.Draw(image)
        for y in range(0, SIZE, 16):  # stripes that drift
            draw.line((0, y + tick % 16, SIZE, y + tick % 16 - 24), tuple(c + 14 for c in back), 4)
        draw.text((SIZE // 2, 48), name.upper(), front, ImageFont.load_default(26), anchor="mm")
        if tick % 9 == 0:
            chosen = int(rng.integers(len(items)))
        for number, item in enumerate(items):
            mark = f"> {item} <" if number == chosen else item
            draw.text(
                (SIZE // 2, 112 + 30 * number),
                mark,
                "white" if number == chosen else front,
                ImageFont.load_default(18),
                "mm",
            )
        yield np.asarray(image)


def _face(scene: Scene, rng: np.random.Generator) -> Iterator[Picture]:
    """Someone who plays, before his game or instead of it."""
    wide = float(rng.choice([0.55, 0.65, 1.0]))
    box = int(SIZE * wide)
    x0, y0 = (int(rng.choice([0, SIZE - box])) for _ in range(2))
    wall, shirt = (tuple(int(c) for c in rng.integers(40, 200, 3)) for _ in range(2))
    skin = [(240, 200, 170), (200, 150, 110), (120, 80, 60)][rng.integers(3)]
    hair = [(40, 30, 20), (160, 110, 50), (200, 60, 60)][rng.integers(3)]
    for tick, game in enumerate(_play(scene, rng)):
        image = Image.new("RGB", (100, 100), wall)
        draw = ImageDraw.Draw(image)
        x, y = 50 + 5 * math.sin(tick / 7) + rng.normal(), 48 + 3 * math.sin(tick / 4)
        draw.ellipse((x - 42, y + 28, x + 42, y + 120), shirt)
        draw.ellipse((x - 27, y - 38, x + 27, y + 20), hair)
        draw.ellipse((x - 23, y - 28, x + 23, y + 33), skin)
        for side in (-9, 9):
            eye = 1 if tick % 30 < 2 else 4
            draw.ellipse((x + side - 5, y - 4 - eye, x + side + 5, y - 4 + eye), "white")
            draw.ellipse((x + side - 2, y - 4 - eye / 2, x + side + 2, y - 4 + eye / 2), "black")
        mouth = 1 + 5 * abs(math.sin(tick * 1.3))
        draw.ellipse((x - 9, y + 17 - mouth, x + 9, y + 17 + mouth), (120, 30, 30))
        shown = Image.fromarray(game)
        shown.paste(image.resize((box, box), Image.Resampling.BILINEAR), (x0, y0))
        yield np.asarray(shown)


def _slides(scene: Scene, rng: np.random.Generator) -> Iterator[Picture]:
    """Stills of a game with words on them, each slowly drawn nearer, with a fade between two."""
    last = np.zeros((SIZE, SIZE, 3), np.uint8)
    while True:
        still = next(_play(scene, rng))
        words = str(rng.choice(["TOP 10 LEVELS", "SUBSCRIBE!", "Part one", "Tips and tricks", "Link below"]))
        for tick in range(30):
            near = 40 + tick
            image = Image.fromarray(still).crop((near, near, SIZE - near, SIZE - near)).resize((SIZE, SIZE))
            ImageDraw.Draw(image).text(
                (SIZE // 2, 210), words, "yellow", ImageFont.load_default(24), "mm", stroke_width=2
            )
            shown = np.asarray(image)
            fade = min((tick + 1) / 6, 1)
            yield (fade * shown + (1 - fade) * last).astype(np.uint8)
        last = shown


# --- what is recorded ---


def plan(scale: float, seed: int) -> list[Recording]:
    """All files of a folder; `scale` is for the number of them whose pictures are whole."""
    rng = np.random.default_rng(seed)
    games, others = itertools.cycle(PLATFORMERS), itertools.cycle(OTHERS)

    def several(count: int) -> range:
        return range(max(round(count * scale), 2))

    def titled(game: str) -> str:
        return f"{PLATFORMERS.get(game, 'Pixel Hero')} - 2D platformer {rng.choice(ACTIONS)} #{rng.integers(1000)}"

    whole: list[tuple[str, str, list[Scene]]] = []  # name, title, scenes
    for number in several(40):
        scenes = [Scene("game", next(games), int(rng.choice([32, 48])))]
        if number % 5 == 4:
            scenes.insert(0, Scene("menu", scenes[0].game, CLIP))
        whole.append(("play", titled(scenes[0].game), scenes))
    for kind, count in (("face", 16), ("menu", 14), ("slides", 12), ("other", 12)):
        for _ in several(count):
            game = next(others if kind == "other" else games)
            whole.append((kind, titled(game), [Scene(kind, game, int(rng.choice([16, 32, 48])))]))
    telling = ("{} the movie: platformer gameplay", "Unboxing {}, a 2D platformer playthrough", "{} platformer music")
    for number in several(6):
        game = next(games)
        title = telling[number % len(telling)].format(PLATFORMERS[game])
        whole.append(("telling", title, [Scene("slides", game, CLIP)]))
    recordings = [
        Recording(
            name=f"{kind} {number:03d}.{rng.choice(['mp4', 'mp4', 'mp4', 'mkv', 'webm'])}",
            title=title,
            description=f"{rng.choice(ACTIONS).capitalize()} of {title.partition(' - ')[0]}, {scenes[-1].seconds} s",
            owner=f"player {rng.integers(24):02d}",
            licence=str(rng.choice(LICENCES)),
            scenes=tuple(scenes),
            seed=int(rng.integers(1 << 30)),
            fps=int(rng.choice([10, 20, 30])),
        )
        for number, (kind, title, scenes) in enumerate(whole)
    ]
    like = replace(recordings[0], scenes=(Scene("game", "coinrun", CLIP),), fps=20)
    odd = [replace(like, name=f"{way}.{suffix}", broken=way, seed=seed + i) for i, (way, suffix) in enumerate(_ODD)]
    return [*recordings, *odd]


# How a file is odd, and its suffix. The first are recorded so; the rest are good files whose bytes were changed.
_ODD = (
    ("variable rate", "mp4"),
    ("wide", "mp4"),
    ("tall", "mkv"),
    ("4k", "mp4"),
    ("hdr", "mp4"),
    ("240 a second", "mp4"),
    ("one frame", "mp4"),
    ("tiny", "webm"),
    ("sound alone", "mp4"),
    ("short", "mp4"),
    ("turned", "mp4"),
    ("cut off", "mp4"),
    ("cut off", "webm"),
    ("damaged", "mp4"),
    ("header alone", "mp4"),
    ("empty", "mp4"),
    ("a text", "mp4"),
    ("missing", "mp4"),
    ("again", "mp4"),
)


def make(recording: Recording, folder: str) -> None:
    path = Path(folder, recording.name)
    if recording.broken == "sound alone":
        return _sound(path)
    _record(recording, path)
    if recording.broken in _BROKEN:
        path.write_bytes(_BROKEN[recording.broken](path.read_bytes()))
    elif recording.broken == "missing":
        path.unlink()
    elif recording.broken == "again":  # the same file under two names
        shutil.copyfile(path, path.with_name("again, by another.mp4"))


def _record(recording: Recording, path: Path) -> None:
    """Encodes the scenes as their recording's suffix asks."""
    way = recording.broken
    sizes = {"wide": (480, 270), "tall": (180, 320), "4k": (3840, 2160), "tiny": (12, 12)}
    width, height = sizes.get(way, (SIZE, SIZE))
    fps = {"240 a second": 240, "4k": TICKS}.get(way, recording.fps)
    codec, options = {
        "webm": ("libvpx", {"deadline": "realtime", "cpu-used": "8", "crf": "20", "b": "1M"}),
        "mkv": ("libx264", {"preset": "ultrafast", "crf": "20"}),
        "mp4": ("libx264", {"preset": "ultrafast", "crf": "20", "g": "50"}),
    }[path.suffix[1:]]
    if way == "hdr":
        codec, options = "libx265", {"preset": "ultrafast", "x265-params": "log-level=none:pools=none"}
    rng = np.random.default_rng(recording.seed)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p10le" if way == "hdr" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.codec_context.thread_count = 1  # the same bytes on every machine
        if way == "hdr":
            context = stream.codec_context
            context.color_primaries, context.color_trc, context.colorspace = 9, 16, 9  # BT.2020, PQ
        milliseconds = 0.0
        for frame in _at_rate(recording, fps, (width, height, stream.pix_fmt)):
            frame.pts, frame.time_base = round(milliseconds), Fraction(1, 1000)
            container.mux(stream.encode(frame))
            milliseconds += 1000 / fps * (rng.uniform(0.2, 1.8) if way == "variable rate" else 1)
            if way == "one frame" or (way == "short" and milliseconds > 3000):
                break
        container.mux(stream.encode(None))


def _at_rate(recording: Recording, fps: int, form: tuple[int, int, str]) -> Iterator[av.VideoFrame]:
    """The scenes one after the other; `form` is width, height and pixel format."""
    for number, scene in enumerate(recording.scenes):
        for picture in pictures(scene, recording.seed + number):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24").reformat(*form)
            yield from itertools.repeat(frame, fps // TICKS)


def _sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        for start in range(0, 44100 * CLIP, 1024):
            tone = np.sin(np.arange(start, start + 1024) * 2 * np.pi * 440 / 44100).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(tone[None], "fltp", "mono")
            frame.sample_rate, frame.pts = 44100, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _turned(data: bytes) -> bytes:
    """By 90 degrees, as a phone's: the matrix in an mp4's track header, which players heed."""
    matrix = data.index(b"tkhd") + 4 + 40
    quarter = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    return data[:matrix] + b"".join(number.to_bytes(4, "big", signed=True) for number in quarter) + data[matrix + 36 :]


def _damaged(data: bytes) -> bytes:
    """Its middle third is noise."""
    third = len(data) // 3
    return data[:third] + np.random.default_rng(0).bytes(third) + data[2 * third :]


_BROKEN = {
    "turned": _turned,
    "damaged": _damaged,
    "cut off": lambda data: data[: len(data) // 2],
    "header alone": lambda data: data[:32],
    "empty": lambda data: b"",
    "a text": lambda data: b"<!doctype html><title>404 Not Found</title>\n" * 20,
}


# --- the folder, and its labels ---


def make_all(folder: Path, scale: float, seed: int, workers: int) -> None:
    recordings = plan(scale, seed)
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        made = pool.map(make, recordings, itertools.repeat(str(folder)))
        for _ in bar(made, desc="make videos", unit="file", total=len(recordings)):
            pass
    twice = [replace(r, name="again, by another.mp4", owner="a copyist") for r in recordings if r.broken == "again"]
    columns = ("id", "path", "title", "description", "owner", "licence")
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(asdict(r) | {"id": r.name, "path": r.name} for r in [*recordings, *twice])
    shown = {r.name: [asdict(scene) for scene in r.scenes] for r in [*recordings, *twice]}
    (folder / "made.json").write_text(json.dumps(shown, indent=1))
    seconds = sum(scene.seconds for r in recordings for scene in r.scenes)
    print(f"{len(recordings) + len(twice)} files, {seconds / 60:.0f} minutes of video: {folder}/manifest.csv")


def label(folder: Path, data_uri: str, labels_uri: str, count: int, seed: int, good_uri: str = "") -> None:
    """Labels up to `count` train clips: good where nothing but a platformer is played, bad where nothing is.

    `good_uri` becomes a data set of the held-out clips that are good.
    """
    store, made = VideoStore.open(f"{data_uri}/train"), json.loads((folder / "made.json").read_text())
    labels: list[Label] = []
    for episode in np.random.default_rng(seed).permutation(store.num_episodes):
        about = store.about(int(episode))
        kinds = _kinds(made, about)
        if len(labels) < count and (kinds == {"game"} or "game" not in kinds):
            said = GOOD if kinds == {"game"} else BAD
            labels.append(Label(**{key: about[key] for key in ("digest", "source", "start_seconds")}, label=said))
    write_labels(labels_uri, labels)
    good = sum(one.label == GOOD for one in labels)
    print(f"{len(labels)} of {store.num_episodes} clips labelled, {good} of them {GOOD}: {labels_uri}")
    if good_uri:
        store = VideoStore.open(f"{data_uri}/eval")
        shards = (store.episodes_in(shard) for shard in range(store.num_shards))
        keep = [np.array([_kinds(made, store.about(e)) == {"game"} for e in shard], bool) for shard in shards]
        write_view(f"{good_uri}/eval", store, keep, store.meta)
        print(f"{sum(int(k.sum()) for k in keep)} of {store.num_episodes} held-out clips are good: {good_uri}")


def _kinds(made: dict[str, list[dict[str, Any]]], about: dict[str, Any]) -> set[str]:
    """What a clip shows. Raises ValueError for one of other videos."""
    if about.get("source") not in made:
        raise ValueError("the data set has clips of other videos: name the folder that it was ingested from")
    scenes, start = made[about["source"]], about["start_seconds"]
    ends = list(itertools.accumulate(scene["seconds"] for scene in scenes))
    shown = zip(scenes, [0, *ends], ends, strict=False)
    return {scene["kind"] for scene, begin, end in shown if begin < start + CLIP and end > start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("make", help="make the videos")
    command.add_argument("folder", type=Path)
    command.add_argument("--scale", type=float, default=1.0, help="times as many videos (default: 1, a hundred)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--workers", type=int, default=2, help="processes")
    command = commands.add_parser("label", help="label clips of what was ingested of them")
    command.add_argument("folder", type=Path)
    command.add_argument("data", help="the data set's URI")
    command.add_argument("labels", help="the file to write")
    command.add_argument("--good", default="", metavar="URI", help="also make a data set of the good held-out clips")
    command.add_argument("--count", type=int, default=100, help="at most so many clips (default: 100)")
    command.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        if args.command == "make":
            make_all(args.folder, args.scale, args.seed, args.workers)
        else:
            label(args.folder, args.data, args.labels, args.count, args.seed, args.good)
    except (ValueError, OSError) as error:
        sys.exit(f"make_videos: {error}")


if __name__ == "__main__":
    main()
