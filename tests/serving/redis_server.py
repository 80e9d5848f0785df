"""A real Redis that keeps what it answered, and that tests stop, freeze and start again."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from redis import Redis, RedisError
from redis.backoff import NoBackoff
from redis.retry import Retry

EXECUTABLE = shutil.which("redis-server") or shutil.which("valkey-server")
PASSWORD = "open-sesame"


class RedisServer:
    """Runs inside `with`; `url` stays the same when it is stopped and started."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"redis://:{PASSWORD}@127.0.0.1:{self.port}/0?socket_timeout=0.5"

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        assert EXECUTABLE
        options = {"bind": "127.0.0.1", "port": self.port, "dir": self._folder, "requirepass": PASSWORD}
        options |= {"appendonly": "yes", "appendfsync": "always", "save": ""}
        command = [EXECUTABLE, *(part for name, value in options.items() for part in (f"--{name}", str(value)))]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while not self._answers():
            assert time.monotonic() < deadline, "redis-server does not start"
            time.sleep(0.02)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(timeout=10)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """It takes what it is sent, and carries it out only afterwards."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def _answers(self) -> bool:
        """It has read its file: before that, it says LOADING."""
        try:
            with Redis.from_url(self.url, retry=Retry(NoBackoff(), 0)) as redis:
                return bool(redis.ping())
        except RedisError:
            return False
