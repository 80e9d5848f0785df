"""Plays the service roughly for a long time: nothing may fail, and its memory may not grow.

    python -m benchmarks.soak MODEL_FOLDER [--minutes 30] [--players 8]

Players come and go: they step, over HTTP and over WebSockets, look back, branch, ask for animations and previews, send
junk and nonsense, delete their session, leave it, or hang up in the middle of a frame. Ends with status 1 after an
answer of 5xx other than 503 ("busy"), after a step that was lost or taken twice, when the service or a player broke
down, or when memory grew: the median of its last third lies more than 3% above that of its second (beside it are the
peaks, which rise and fall with what comes together).
"""

from __future__ import annotations

import argparse
import collections
import http.client
import json
import random
import statistics
import subprocess
import sys
import threading
import time
import urllib.parse

import psutil
from websockets.sync.client import connect

from genie_model.progress import bar

_FORM, _JSON = "application/x-www-form-urlencoded", "application/json"
_JUNK = (b"", b"{", b"\x89PNG\r\n\x1a\n" + bytes(50), b"GIF89a" + bytes(9), bytes(200_000))


class Player:
    """Does what comes into its head until the end; `wrong` collects what must not happen."""

    def __init__(self, address: str, seed: int, seen: collections.Counter[str], wrong: list[str]) -> None:
        self.address, self.random, self.seen, self.wrong = address, random.Random(seed), seen, wrong
        self.connection = http.client.HTTPConnection(address, timeout=60)

    def ask(self, method: str, path: str, body: str | bytes | None = None, kind: str = _JSON) -> tuple[int, bytes]:
        self.connection.request(method, path, body, {"Content-Type": kind})
        answer = self.connection.getresponse()
        text = answer.read()
        self.seen[f"{method} {answer.status}"] += 1
        if answer.status >= 500 and answer.status != 503:
            self.wrong.append(f"{method} {path}: {answer.status} {text[:200]!r}")
        return answer.status, text

    def hang_up(self, path: str, body: str) -> None:
        self.connection.request("POST", path, body, {"Content-Type": _JSON})
        time.sleep(self.random.uniform(0, 0.05))
        self.connection.close()

    def play(self, end: float) -> None:
        try:
            while time.monotonic() < end and not self.wrong:
                self.session(end)
        except Exception as error:  # no answer, or one that cannot be read
            self.wrong.append(f"a player broke down: {error!r}")

    def live(self, here: str, steps: int, num_actions: int) -> int:
        """A few steps over a WebSocket, which may be left in the middle of one; how many there are then."""
        self.connection.close()  # the service would, while it is idle
        with connect(f"ws://{self.address}{here}/play", compression=None) as socket:
            self.expect(here, steps, _step_of(socket.recv(60)))
            for _ in range(self.random.randrange(1, 20)):
                step = json.dumps({"action": self.random.randrange(num_actions), "step": steps + 1})
                socket.send(step)
                if self.random.random() < 0.05:
                    break
                steps += 1
                self.expect(here, steps, _step_of(socket.recv(60)))
                self.seen["WS step"] += 1
            else:
                return steps
        status, text = self.ask("POST", f"{here}/step", step)  # whether it was taken or not
        if status != 200:
            self.wrong.append(f"step {steps + 1}, sent again: {status} {text[:200]!r}")
        return steps + 1

    def expect(self, here: str, steps: int, found: int) -> None:
        if found != steps:
            self.wrong.append(f"{here} does not stand at step {steps}, but at {found}")

    def session(self, end: float) -> None:
        if self.random.random() < 0.2:
            self.upload_junk()
        names = [frame["name"] for frame in json.loads(self.ask("GET", "/v1/starts")[1])["start_frames"]]
        form = urllib.parse.urlencode({"start_frame": self.random.choice(names)})
        status, text = self.ask("POST", "/v1/sessions", form, _FORM)
        if status == 503:  # all are taken
            time.sleep(0.5)
            return
        session, steps = json.loads(text), 0
        here = f"/v1/sessions/{session['id']}"
        for _ in range(self.random.randrange(5, 80)):
            if time.monotonic() > end:
                break
            body = json.dumps({"action": self.random.randrange(session["model"]["num_actions"]), "step": steps + 1})
            whim = self.random.random()
            if whim < 0.02:
                self.hang_up(f"{here}/step", body)  # whether it was taken, the next answer tells: it is sent again
            elif whim < 0.04:
                self.ask("GET", f"{here}/previews?repeats=2")
            elif whim < 0.06:
                self.ask("GET", f"{here}/frames/{self.random.randrange(-1, steps + 2)}")
            elif whim < 0.07:
                self.ask("GET", f"{here}/animation.gif?last=50")
            elif whim < 0.08:
                status, text = self.ask("POST", f"{here}/branch", json.dumps({"t": self.random.randrange(steps + 1)}))
                if status == 201:
                    self.ask("DELETE", f"/v1/sessions/{json.loads(text)['id']}")
            elif whim < 0.10:
                steps = self.live(here, steps, session["model"]["num_actions"])
                continue
            elif whim < 0.11:
                self.ask("POST", f"{here}/step", self.random.choice(('{"action": 99}', '{"action": "x"}', "[", "{}")))
            status, text = self.ask("POST", f"{here}/step", body)
            if status != 200:
                self.wrong.append(f"step {steps + 1}: {status} {text[:200]!r}")
                return
            steps += 1
        self.expect(here, steps, json.loads(self.ask("GET", here)[1])["steps"])
        if self.random.random() < 0.7:
            self.ask("DELETE", here)

    def upload_junk(self) -> None:
        junk = self.random.choice(_JUNK)
        head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        self.ask("POST", "/v1/sessions", head + junk + b"\r\n--x--\r\n", "multipart/form-data; boundary=x")


def _step_of(frame: str | bytes) -> int:
    if isinstance(frame, str):
        raise ValueError(f"not a frame but {frame[:200]}")
    return int(json.loads(frame[4 : 4 + int.from_bytes(frame[:4], "little")])["step"])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder with config.json, model.safetensors and start_frames/")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--players", type=int, default=8)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "serving", "--port", "0", "--model-uri", arguments.model]
    command += ["--session-store", ":memory:", "--idle-seconds", "60", "--client-sessions", "0"]
    command += ["--client-worlds-per-minute", "0", "--client-steps-per-minute", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    seen, wrong, memory = collections.Counter[str](), list[str](), list[float]()
    try:
        assert process.stdout
        said = next((line for line in process.stdout if "http://" in line), "")
        if not said:
            parser.error(f"the service does not start with {arguments.model}")
        address = said.split("http://")[1].split()[0]
        end = time.monotonic() + 60 * arguments.minutes
        players = [Player(address, seed, seen, wrong) for seed in range(arguments.players)]
        threads = [threading.Thread(target=player.play, args=(end,), daemon=True) for player in players]
        for thread in threads:
            thread.start()
        seconds = bar(desc="soak", unit="s", total=int(60 * arguments.minutes))
        while any(thread.is_alive() for thread in threads) and not wrong:
            time.sleep(1)
            seconds.update(1)
            if process.poll() is not None:
                wrong.append(f"the service ended with status {process.returncode}")
                break
            memory.append(psutil.Process(process.pid).memory_info().rss / 2**20)
        seconds.close()
    finally:
        process.terminate()
        process.wait(timeout=30)
    third = len(memory) // 3
    thirds = memory[third : 2 * third], memory[2 * third :]
    (early, late), peaks = (statistics.median(one) for one in thirds), [max(one) for one in thirds]
    print(", ".join(f"{what}: {count}" for what, count in sorted(seen.items())))
    print(
        f"memory: {early:.0f} MB in the second third, {late:.0f} MB in the last ({late / early - 1:+.1%}); "
        f"at most {peaks[0]:.0f} and {peaks[1]:.0f} MB"
    )
    if late > 1.03 * early:
        wrong.append("memory grew by more than 3%")
    for what in wrong:
        print(f"WRONG: {what}", file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
