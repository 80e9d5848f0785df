"""How the play service does with one player and with several, beside the library alone.

    python -m benchmarks.service MODEL_FOLDER [--players 1 8] [--rounds 8] [--store FILE] [--over websocket http]

The service runs as a process of its own; its players share the cores with it, and what they take of them is shown.
Every player holds a session and sends its next action once its frame has come, over a WebSocket or over HTTP. Latency
is from the key to the frame's bytes. A round is the library alone and then the service, for 3 seconds each, so that a
machine that slows down slows both: figures are medians over rounds, and the share is the median of the rounds' shares,
with their quartiles. The floor is a frame's counted FLOPs at the rate of one large bfloat16 matmul on all cores.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch
import websockets
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.__main__ import machine
from genie_model.checkpoint import load_model
from genie_model.genie import Genie
from genie_model.speed import matmul_rate
from serving.sessions import FEW

_WARM = 20  # frames: past the model's window, so that every step looks at a full one
_SECONDS = 3.0  # of a round, for either side; the players' windows fill as long before


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.service", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder with config.json, model.safetensors and start_frames/")
    parser.add_argument("--players", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--store", default=":memory:", help="the session store's file")
    parser.add_argument("--over", nargs="+", choices=("websocket", "http"), default=["websocket"])
    parser.add_argument("--json", type=Path, default=Path("build/service.json"))
    arguments = parser.parse_args()
    try:
        genie = load_model(arguments.model)
    except ValueError as error:
        parser.error(str(error))
    rows, flops = [], flops_of_frame(genie)
    for over, players in itertools.product(arguments.over, arguments.players):
        rate = matmul_rate(4096)
        found = measured(genie, arguments.model, arguments.store, over, players, arguments.rounds)
        rate = (rate + matmul_rate(4096)) / 2
        rows.append({"over": over, "players": players, **found, "matmul": rate, "floor_fps": rate / flops})
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(
        "| over | players | frames/s together | key to frame, median | p95 | library, one pass for all | share of it "
        "| players take of the cores | share of the floor |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['over']} | {row['players']} | {row['fps']:.1f} | {row['median_ms']:.0f} ms "
            f"| {row['p95_ms']:.0f} ms | {row['library_fps']:.1f} frames/s "
            f"| {row['share']:.0%} ({row['share_low']:.0%} to {row['share_high']:.0%}) "
            f"| {row['players_take']:.0%} | {row['fps'] / row['floor_fps']:.0%} |"
        )
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2))


def flops_of_frame(genie: Genie) -> int:
    """With a full window behind it."""
    state = genie.start(torch.zeros(1, genie.config.data.clip_length, *genie.config.frame_shape, dtype=torch.uint8))
    with FlopCounterMode(display=False) as counter:
        genie.step(state, torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops()


def library_frames_per_second(genie: Genie, worlds: int, seconds: float) -> float:
    """With as many threads as the service gives to a pass: it leaves one core to requests where few play."""
    torch.set_num_threads(max((os.cpu_count() or 2) - (worlds <= FEW), 1))
    state = genie.start(torch.zeros(worlds, 1, *genie.config.frame_shape, dtype=torch.uint8))
    times: list[float] = []
    while len(times) < _WARM + 5 or sum(times) < seconds:
        began = time.perf_counter()
        genie.step(state, torch.full((worlds,), len(times) // 8 % genie.config.num_actions))
        times.append(time.perf_counter() - began)
    return worlds / statistics.median(times[_WARM:])


def measured(genie: Genie, model: str, store: str, over: str, players: int, rounds: int) -> dict[str, float]:
    command = [sys.executable, "-m", "serving", "--port", "0", "--model-uri", model, "--session-store", store]
    command += ["--client-sessions", "0", "--client-worlds-per-minute", "0", "--client-steps-per-minute", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        address = next(line for line in process.stdout if "http://" in line).split("http://")[1].split()[0]
        alone, together, latencies, busy = [], [], list[float](), 0.0
        for _ in range(rounds):
            alone.append(library_frames_per_second(genie, players, _SECONDS))
            begin = time.perf_counter() + _SECONDS
            before = sum(psutil.Process().cpu_times()[:2])
            taken = asyncio.run(play_together(address, over, players, begin, begin + _SECONDS))
            busy += sum(psutil.Process().cpu_times()[:2]) - before
            together.append(len(taken) / _SECONDS)
            latencies += taken
    finally:
        process.terminate()
        process.wait(timeout=30)
    shares = [one / other for one, other in zip(together, alone, strict=True)]
    low, share, high = statistics.quantiles(shares) if rounds > 1 else shares * 3
    return {
        "fps": statistics.median(together),
        "library_fps": statistics.median(alone),
        "share": share,
        "share_low": low,
        "share_high": high,
        "median_ms": 1e3 * statistics.median(latencies),
        "p95_ms": 1e3 * sorted(latencies)[int(0.95 * len(latencies))],
        "players_take": busy / (2 * _SECONDS * rounds) / (os.cpu_count() or 1),  # they play as long before it counts
    }


async def play_together(address: str, over: str, players: int, begin: float, end: float) -> list[float]:
    """The seconds that each step took whose frame came between the two moments."""
    sessions = [Player(address, number) for number in range(players)]
    if over == "websocket":
        taken = await asyncio.gather(*(session.play_live(begin, end) for session in sessions))
    else:
        with ThreadPoolExecutor(players) as pool:
            taken = list(pool.map(lambda session: session.play(begin, end), sessions))
    for session in sessions:
        session.leave()
    return [latency for one in taken for latency in one]


class Player:
    """Begins a session; then takes one action after another, each for a while."""

    def __init__(self, address: str, number: int) -> None:
        self._address, self._number = address, number
        self._connection = http.client.HTTPConnection(address, timeout=60)
        names = [frame["name"] for frame in json.loads(self._answer("GET", "/v1/starts"))["start_frames"]]
        form = urllib.parse.urlencode({"start_frame": names[number % len(names)], "seed": number})
        self._session = json.loads(self._answer("POST", "/v1/sessions", form, "application/x-www-form-urlencoded"))

    def play(self, begin: float, end: float) -> list[float]:
        """The seconds that each step took whose frame came between the two moments."""
        latencies, t = [], 0
        while (sent := time.perf_counter()) < end:
            self._answer("POST", f"/v1/sessions/{self._session['id']}/step", self._step(t))
            t += 1
            if begin < (now := time.perf_counter()) < end:
                latencies.append(now - sent)
        return latencies

    async def play_live(self, begin: float, end: float) -> list[float]:
        """The same over a WebSocket."""
        latencies, t = [], 0
        async with websockets.connect(f"ws://{self._address}/v1/sessions/{self._session['id']}/play") as socket:
            await socket.recv()  # where the session stands
            while (sent := time.perf_counter()) < end:
                await socket.send(self._step(t))
                frame = await socket.recv()
                if isinstance(frame, str):
                    raise RuntimeError(f"a step was answered with {frame[:300]}")
                t += 1
                if begin < (now := time.perf_counter()) < end:
                    latencies.append(now - sent)
        return latencies

    def leave(self) -> None:
        self._connection.close()  # the service has closed one that was idle; the next request opens another
        self._answer("DELETE", f"/v1/sessions/{self._session['id']}")

    def _step(self, t: int) -> str:
        return json.dumps({"action": (t // 8 + self._number) % self._session["model"]["num_actions"]})

    def _answer(self, method: str, path: str, body: str | None = None, kind: str = "application/json") -> bytes:
        self._connection.request(method, path, body, {"Content-Type": kind})
        found = self._connection.getresponse()
        text = found.read()
        if found.status >= 400:
            raise RuntimeError(f"{method} {path} was answered with {found.status}: {text[:300]!r}")
        return text


if __name__ == "__main__":
    main()
