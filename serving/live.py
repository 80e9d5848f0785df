"""Play over one connection: actions come in, frames go out, and whoever reads slowly gets the newest."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from contextlib import suppress
from typing import Annotated, Literal

from fastapi import APIRouter, Query, WebSocket, WebSocketDisconnect
from pydantic import ValidationError

from serving.clients import Client, Clients
from serving.engine import Engine
from serving.errors import BadRequestError, ServiceError, TooManySocketsError, UnknownSessionError, problem
from serving.images import Picture
from serving.schemas import StepRequest
from serving.sessions import Session

live = APIRouter(prefix="/v1")
PictureFormat = Literal["png", "webp", "jpeg"]


class Outbox:
    """Holds one message, the newest: a newer frame takes the place of one that could not be sent yet."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket
        self._frame: bytes | None = None
        self._came = asyncio.Event()

    def put(self, frame: bytes) -> None:
        self._frame = frame
        self._came.set()

    async def send(self) -> None:
        """Sends what is put; runs until cancelled."""
        while True:
            await self._came.wait()
            self._came.clear()
            frame, self._frame = self._frame, None
            if frame is not None:
                await self._socket.send_bytes(frame)


@live.websocket("/sessions/{session_id}/play")
async def play(
    socket: WebSocket,
    session_id: str,
    file_format: Annotated[PictureFormat, Query(alias="format")] = "png",
    large: bool = False,
) -> None:
    """Takes actions as JSON, the body of POST step; the newest frame comes as a binary message.

    A frame is 4 bytes, little-endian: how long the JSON is that follows, {"step", "milliseconds", "version"}; then the
    picture. The first message is the frame where the session stands, so a player who connects again goes on from there.
    With `large=true` in the address frames come from the model's larger decoder; 4422 says that it has none.
    A bad request is answered with a JSON text, the problem as over HTTP, and leaves the connection open; a session that
    is not there closes it with 4404, one that has too many connections with 4429, a service that cannot open it with
    4503.
    """
    engine: Engine = socket.app.state.engine
    clients: Clients = socket.app.state.clients
    client: Client = socket.state.client
    most: int = socket.app.state.settings.max_sockets
    await socket.accept()
    engine.sockets[session_id] += 1
    outbox = Outbox(socket)
    sending = asyncio.create_task(outbox.send())
    try:
        if engine.sockets[session_id] > most:
            raise TooManySocketsError(f"this session has {most} connections: close one")
        session = await engine.session_now(session_id, client)
        outbox.put(message(session, *await engine.newest(session, large), 0.0, file_format))
        while (received := await socket.receive())["type"] != "websocket.disconnect":
            asked = received.get("text") or ""
            wrong = await answer(engine, clients, client, session_id, asked, file_format, large, outbox)
            if wrong:
                await socket.send_json(wrong)
    except ServiceError as error:
        with suppress(WebSocketDisconnect, RuntimeError):  # it left by itself
            await socket.close(4000 + error.status, error.detail.encode()[:120].decode(errors="ignore"))  # 123 fit
    except WebSocketDisconnect:
        return
    finally:
        engine.sockets -= Counter([session_id])  # drops what comes to nothing
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)  # a send that met a closed connection


async def answer(
    engine: Engine,
    clients: Clients,
    client: Client,
    session_id: str,
    text: str,
    file_format: PictureFormat,
    large: bool,
    outbox: Outbox,
) -> dict[str, object] | None:
    """Takes the step that is asked for; the problem, if there is one. Raises UnknownSessionError."""
    try:
        asked, began = StepRequest.model_validate_json(text), time.perf_counter()
        clients.count_steps(client, len(asked.taken))
        session, steps, picture = await engine.step(session_id, asked.taken, client, asked.step, large)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'message'}: {e['msg']}" for e in error.errors())
        return problem(BadRequestError.status, BadRequestError.code, wrong)
    except UnknownSessionError:
        raise
    except ServiceError as error:
        return problem(error.status, error.code, error.detail)
    outbox.put(message(session, steps, picture, 1e3 * (time.perf_counter() - began), file_format))
    return None


def message(session: Session, steps: int, picture: Picture, milliseconds: float, file_format: PictureFormat) -> bytes:
    head = json.dumps(
        {"step": steps, "milliseconds": round(milliseconds, 1), "version": session.model.info.version}
    ).encode()
    return len(head).to_bytes(4, "little") + head + picture.packed(file_format)
