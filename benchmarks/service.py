"""How the play service does with one player and with several, beside the library alone.

    python -m benchmarks.service MODEL_FOLDER [--players 1 8] [--seconds 20] [--store FILE]

The service runs as a process of its own; its players share the cores with it. Every player holds a session and sends
its next action once its frame has come. Latency is from the key to the frame's bytes.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.__main__ import machine, matmul_rate
from genie_model.checkpoint import load_model
from genie_model.genie import Genie

_WARM = 20  # frames: past the model's window, so that every step looks at a full one


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.service", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder with config.json, model.safetensors and start_frames/")
    parser.add_argument("--players", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--store", default=":memory:", help="the session store's file")
    parser.add_argument("--json", type=Path, default=Path("build/service.json"))
    arguments = parser.parse_args()
    try:
        genie = load_model(arguments.model)
    except ValueError as error:
        parser.error(str(error))
    rows = []
    for players in arguments.players:
        rate = matmul_rate(4096)
        alone = library_frames_per_second(genie, players, arguments.seconds / 4)
        found = service(arguments.model, arguments.store, players, arguments.seconds)
        after = library_frames_per_second(genie, players, arguments.seconds / 4)
        rows.append({"players": players, "library_fps": (alone + after) / 2, **found, "matmul": rate})
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print("| players | frames/s together | key to frame, median | p95 | library, one pass for all | share of it |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['players']} | {row['fps']:.1f} | {row['median_ms']:.0f} ms | {row['p95_ms']:.0f} ms "
            f"| {row['library_fps']:.1f} frames/s | {row['fps'] / row['library_fps']:.0%} |"
        )
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2))


def library_frames_per_second(genie: Genie, worlds: int, seconds: float) -> float:
    state = genie.start(torch.zeros(worlds, 1, *genie.config.frame_shape, dtype=torch.uint8))
    times: list[float] = []
    while len(times) < _WARM + 5 or sum(times) < seconds:
        began = time.perf_counter()
        genie.step(state, torch.full((worlds,), len(times) // 8 % genie.config.num_actions))
        times.append(time.perf_counter() - began)
    return worlds / statistics.median(times[_WARM:])


def service(model: str, store: str, players: int, seconds: float) -> dict[str, float]:
    command = [sys.executable, "-m", "serving", "--port", "0", "--model-uri", model, "--session-store", store]
    command += ["--client-sessions", "0", "--client-worlds-per-minute", "0", "--client-steps-per-minute", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        address = next(line for line in process.stdout if "http://" in line).split("http://")[1].split()[0]
        begin = time.perf_counter() + 3
        with ThreadPoolExecutor(players) as pool:
            taken = pool.map(lambda player: play(address, player, begin, begin + seconds), range(players))
        latencies = sorted(latency for one in taken for latency in one)
    finally:
        process.terminate()
        process.wait(timeout=30)
    return {
        "fps": len(latencies) / seconds,
        "median_ms": 1e3 * statistics.median(latencies),
        "p95_ms": 1e3 * latencies[int(0.95 * len(latencies))],
    }


def play(address: str, player: int, begin: float, end: float) -> list[float]:
    """The seconds that each step took whose frame came between the two moments."""
    connection = http.client.HTTPConnection(address, timeout=60)

    def answer(method: str, path: str, body: str | None = None, kind: str = "application/json") -> bytes:
        connection.request(method, path, body, {"Content-Type": kind})
        found = connection.getresponse()
        text = found.read()
        if found.status >= 400:
            raise RuntimeError(f"{method} {path} was answered with {found.status}: {text[:300]!r}")
        return text

    names = [frame["name"] for frame in json.loads(answer("GET", "/v1/starts"))["start_frames"]]
    form = urllib.parse.urlencode({"start_frame": names[player % len(names)], "seed": player})
    session = json.loads(answer("POST", "/v1/sessions", form, "application/x-www-form-urlencoded"))
    latencies, t = [], 0
    while (sent := time.perf_counter()) < end:
        action = (t // 8 + player) % session["model"]["num_actions"]
        answer("POST", f"/v1/sessions/{session['id']}/step", json.dumps({"action": action}))
        t += 1
        if begin < (now := time.perf_counter()) < end:
            latencies.append(now - sent)
    return latencies


if __name__ == "__main__":
    main()
