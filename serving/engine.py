"""Sessions, and the one thread in which the model works.

All sessions live on the event loop, so they need no locks among themselves. Everything that touches torch runs in one
worker thread: the event loop never blocks, and a model's state is never used twice at once. A session has a lock too,
so that it holds at most one place in the worker's queue and no player can crowd out the others.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch

from genie_model.genie import PlayState
from serving.errors import BadRequestError, NotReadyError, SessionMovedError, TooManySessionsError, UnknownSessionError
from serving.images import Pixels
from serving.model import LoadedModel, ModelSource, load, warm
from serving.schemas import SessionInfo
from serving.settings import Settings

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class Session:
    """One player's world: it keeps the model it began with until it ends."""

    id: str
    model: LoadedModel
    state: PlayState
    seed: int
    frame_HWC: Pixels
    steps: int = 0
    last_used: float = field(default_factory=time.monotonic)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def info(self) -> SessionInfo:
        return SessionInfo(id=self.id, model=self.model.info, seed=self.seed, steps=self.steps)


class Engine:
    """Follows the champion and plays sessions."""

    def __init__(self, settings: Settings, source: ModelSource) -> None:
        self._settings = settings
        self._source = source
        self._model: LoadedModel | None = None
        self._problem = "the model is loading"
        self._sessions: dict[str, Session] = {}
        self._starting = 0
        self.decoding = asyncio.Semaphore(2)  # uploads decoded at once: a picture of 40 megapixels takes 300 MB
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._stopped = threading.Event()

    # ---- the model

    @property
    def model(self) -> LoadedModel:
        """What new sessions play. Raises NotReadyError with the reason while there is none."""
        if self._model is None:
            raise NotReadyError(self._problem)
        return self._model

    def refresh(self) -> None:
        """Loads and warms the champion beside the model in use, then swaps, if it is another version.

        Raises ValueError, saying what to do, when there is no champion or it does not load; the model in use stays.
        """
        version = self._source.champion()
        if self._model and (self._model.info.version, self._model.info.run_id) == (version.version, version.run_id):
            return
        began = time.perf_counter()
        model = load(version)
        self._worker.submit(warm, model).result()
        self._model = model
        log.info("serving %s version %s, loaded in %.1f s", version.name, version.version, time.perf_counter() - began)

    def follow(self) -> None:
        """Starts to look for a new champion every `poll_seconds`, in a thread that dies with the process."""
        threading.Thread(target=self._follow, name="follow-champion", daemon=True).start()

    def _follow(self) -> None:
        while not self._stopped.is_set():
            try:
                self.refresh()
                self._problem = ""
            except Exception as error:  # whatever is wrong with the registry or a new version, players play on
                if str(error) != self._problem:
                    self._problem = str(error)
                    log.warning("no new model: %s", error)
            self._stopped.wait(self._settings.poll_seconds)

    def close(self) -> None:
        self._stopped.set()
        self._worker.shutdown(wait=True, cancel_futures=True)

    # ---- the sessions

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    def session(self, session_id: str) -> Session:
        """Raises UnknownSessionError."""
        session = self._sessions.get(session_id)
        if session is None:
            raise UnknownSessionError("this session does not exist or has ended: create a new one")
        return session

    async def create(self, model: LoadedModel, frame_HWC: Pixels, seed: int | None) -> Session:
        """A world that starts at `frame_HWC`: uint8, of the model's frame size. Raises TooManySessionsError."""
        if self.num_sessions + self._starting >= self._settings.max_sessions:
            raise TooManySessionsError(
                f"all {self._settings.max_sessions} sessions are taken: end one or try again later"
            )
        seed = secrets.randbelow(2**31) if seed is None else seed
        self._starting += 1
        try:
            prompt_BTHWC = torch.from_numpy(frame_HWC.copy())[None, None]
            state = await self._run(lambda: model.genie.start(prompt_BTHWC, seed=seed))
        finally:
            self._starting -= 1
        session = Session(secrets.token_urlsafe(12), model, state, seed, frame_HWC)
        self._sessions[session.id] = session
        return session

    async def step(self, session: Session, action: int) -> tuple[int, Pixels]:
        """Takes `action`; returns the steps so far and the frame they led to, (H, W, 3). Raises BadRequestError."""
        num_actions = session.model.info.num_actions
        if not 0 <= action < num_actions:
            raise BadRequestError(f"action must be from 0 to {num_actions - 1}, not {action}")
        async with session.lock:
            frame_BHWC = await self._run(lambda: session.model.genie.step(session.state, torch.tensor([action])))
            session.frame_HWC = frame_BHWC[0].numpy()
            session.steps += 1
            session.last_used = time.monotonic()
            return session.steps, session.frame_HWC

    async def previews(self, session: Session, repeats: int) -> Pixels:
        """The frame that each action leads to when taken `repeats` times from here: uint8 (A, H, W, 3).

        The session itself stays where it is. Its own steps go first: then SessionMovedError is raised.
        """
        genie, actions = session.model.genie, torch.arange(session.model.info.num_actions)
        async with session.lock:
            steps, worlds = session.steps, await self._run(partial(session.state.repeat, len(actions)))
        for _ in range(repeats):
            async with session.lock:
                if session.steps != steps:
                    raise SessionMovedError("the session went on while its previews were drawn: ask again")
                frames_AHWC = await self._run(partial(genie.step, worlds, actions))
        return frames_AHWC.numpy()

    def delete(self, session_id: str) -> None:
        """Raises UnknownSessionError."""
        del self._sessions[self.session(session_id).id]

    async def expire_idle(self) -> None:
        """Ends sessions that nobody has stepped for `idle_seconds`; runs until cancelled."""
        while True:
            await asyncio.sleep(min(self._settings.idle_seconds / 4, 30.0))
            oldest = time.monotonic() - self._settings.idle_seconds
            for session in [s for s in self._sessions.values() if s.last_used < oldest]:
                self.delete(session.id)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)
