"""A headless Chromium driven over its DevTools protocol: as much of it as the page's tests need."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import websocket

EXECUTABLE = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-sync",
    "--no-first-run",
    "--remote-debugging-port=0",
)
_KEYS = {"Backspace": 8, "Enter": 13, "Escape": 27, " ": 32, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}


class Chromium:
    """One page in a browser of its own; `errors` collects what the console and uncaught exceptions say."""

    def __init__(self) -> None:
        assert EXECUTABLE
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            [EXECUTABLE, *_FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.errors: list[str] = []
        self._commands = 0
        self._socket = websocket.create_connection(self._page_url(), timeout=30, suppress_origin=True)
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def open(self, url: str, width: int = 1200, height: int = 800, mobile: bool = False) -> None:
        """Shows `url` in a window of that many pixels, its errors counted anew."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.send("Page.navigate", url="about:blank")  # so that the page before says good-bye
        self.errors.clear()
        self.send("Page.navigate", url=url)

    def _page_url(self) -> str:
        """The DevTools socket of the blank page; Chromium writes its port into its profile."""
        port_file = Path(self._profile.name, "DevToolsActivePort")
        wait_for(lambda: port_file.exists() and port_file.read_text().count("\n"), "Chromium to start", 30)
        port = port_file.read_text().split()[0]
        pages = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=10))
        return next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        (result,) = self._send((method, params))
        return result

    def _send(self, *commands: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """What each comes to. None waits here for the answer to the one before, so that a slow test parts none."""
        methods, results = dict[int, str](), dict[int, dict[str, Any]]()
        for method, params in commands:
            self._commands += 1
            methods[self._commands] = method
            self._socket.send(json.dumps({"id": self._commands, "method": method, "params": params}))
        while len(results) < len(methods):
            message = json.loads(self._socket.recv())
            if (number := message.get("id")) in methods:
                assert "error" not in message, f"{methods[number]}: {message['error']}"
                results[number] = message["result"]
            else:
                self._note(message)
        return [results[number] for number in methods]

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"].get("exception", {}).get("description", "exception"))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.errors.append(str([argument.get("value") for argument in params["args"]]))

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_until(self, script: str, seconds: float = 15) -> None:
        wait_for(lambda: self.evaluate(script), script, seconds)

    def key_down(self, key: str) -> None:
        self._send(_key_event("keyDown", key))

    def key_up(self, key: str) -> None:
        self._send(_key_event("keyUp", key))

    def press(self, key: str) -> None:
        """Down and up at once: what is held is taken again."""
        self._send(_key_event("keyDown", key), _key_event("keyUp", key))

    def screenshot(self, path: str | Path, full_page: bool = True) -> None:
        data = self.send("Page.captureScreenshot", captureBeyondViewport=full_page)["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def close(self) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait(timeout=20)
        self._profile.cleanup()


def wait_for(condition: Any, what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what}"
        time.sleep(0.05)


def _key_event(kind: str, key: str) -> tuple[str, dict[str, Any]]:
    event = {"type": kind, "key": key, "windowsVirtualKeyCode": _code(key)}
    if kind == "keyDown" and (key == "Enter" or len(key) == 1):
        event["text"] = "\r" if key == "Enter" else key
    return "Input.dispatchKeyEvent", event


def _code(key: str) -> int:
    return _KEYS.get(key) or ord(key.upper())
