"""`python -m serving`: what cannot work is refused with one line and a non-zero exit."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from serving.__main__ import bind, main


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 1
    line = capsys.readouterr().err.strip()
    assert line.startswith("serving: ")
    assert "\n" not in line
    return line


def test_a_port_in_use(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = refused(["--port", port, "--model-uri", str(model_folder)], capsys)
    assert f"port {port}" in line
    assert "--port" in line


def test_frames_leave_without_delay() -> None:
    async def accepted_nodelay(listener: socket.socket) -> int:
        seen: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            seen.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(connected, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            nodelay = await seen
            writer.close()
        return nodelay

    assert asyncio.run(accepted_nodelay(bind("127.0.0.1", 0)))


def test_a_folder_that_holds_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(tmp_path) in refused(["--port", "0", "--model-uri", str(tmp_path)], capsys)


def test_no_registry_server(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["--port", "0", "--tracking-uri", "http://127.0.0.1:9"], capsys)
    assert "no MLflow server answers at http://127.0.0.1:9" in line


def test_a_setting_out_of_range(capsys: pytest.CaptureFixture[str]) -> None:
    assert "port" in refused(["--port", "70000"], capsys)


def test_settings_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GENIE_MAX_SESSIONS", "none")
    assert "max_sessions" in refused(["--port", "0"], capsys)
