"""Sessions, and what players do with them.

All sessions live on the event loop, so they need no locks among themselves. Everything that touches torch or the
store is the worker's: the event loop never blocks. A session has a lock too, so that it holds at most one place among
the steps that wait, and no player can crowd out the others.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from genie_model.config import SamplingConfig
from genie_model.layers import TemporalCache
from serving.clients import Client
from serving.errors import (
    BadRequestError,
    NotReadyError,
    ServiceError,
    SessionMovedError,
    SlowStepError,
    TooManyRequestsError,
    TooManySessionsError,
    TooManySessionsOfClientError,
    UnknownSessionError,
)
from serving.images import Picture, Pixels, frame_from_png, picture_of
from serving.metrics import Metrics
from serving.model import LoadedModel, ModelSource
from serving.models import Models
from serving.passes import Passes, Worker
from serving.schemas import ModelVersionInfo
from serving.sessions import ELSEWHERE, ENDED, Keeper, Session
from serving.settings import Settings
from serving.store import open_store
from serving.turns import Decoding, LongJobs, leave_if

log = logging.getLogger(__name__)
T = TypeVar("T")
_LOAD_SECONDS = 60.0
_PREVIEWS = 3  # requests for them that one session may have
_ALONE_SECONDS = 2.0  # a world nobody steps for so long no longer holds on to those it stepped beside
_PARK_SECONDS = 120.0  # a world nobody steps for so long leaves memory; its tokens bring it back


class Engine:
    """Follows the champion and plays sessions."""

    def __init__(self, settings: Settings, source: ModelSource, metrics: Metrics) -> None:
        """Raises ValueError when the store cannot be used."""
        self._settings = settings
        self._keeper = Keeper(open_store(settings.session_store, settings.idle_seconds), settings.threads)
        self._sessions: dict[str, Session] = {}
        self._opening: dict[str, asyncio.Task[Session]] = {}
        self.sockets = Counter[str]()  # open to each session
        self._starting = Counter[str]()  # sessions about to be open, of each client
        self.long_jobs, self.decoding = LongJobs(settings), Decoding(settings)
        self._worker = Worker(settings)
        self.passes = Passes(settings, metrics, self._worker, self._keeper, self._is_open, self._drop)
        self._loaders = ThreadPoolExecutor(max_workers=2, thread_name_prefix="load")
        self._lister = ThreadPoolExecutor(max_workers=1, thread_name_prefix="list")
        self.models = Models(settings, source, metrics, self._worker.run_from_thread)

    # ---- models

    @property
    def model(self) -> LoadedModel:
        """What new sessions play. Raises NotReadyError with the reason while there is none."""
        if self.models.champion is None:
            raise NotReadyError(self.models.problem)
        return self.models.champion

    async def version(self, asked: str | None) -> LoadedModel:
        """The version of that number or alias, by default the champion. Raises as `Models.asked`."""
        return await self._load(self._loaders, partial(self.models.asked, asked)) if asked else self.model

    async def versions(self) -> list[ModelVersionInfo]:
        """All that the source knows of. Raises NotReadyError when it cannot be asked."""
        return await self._load(self._lister, self.models.listed)

    async def _load(self, threads: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        """In threads of their own, so that a registry that hangs holds up no player whose model is in memory."""
        try:
            found = asyncio.get_running_loop().run_in_executor(threads, work)
            return await asyncio.wait_for(found, _LOAD_SECONDS)
        except TimeoutError:
            raise NotReadyError(f"no model after {_LOAD_SECONDS:g} seconds: try again later") from None

    def close(self) -> None:
        self.models.close()
        for threads in (self._loaders, self._lister):
            threads.shutdown(wait=False, cancel_futures=True)
        self._worker.close()
        self._keeper.store.close()

    # ---- the sessions

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    async def session(self, session_id: str, client: Client) -> Session:
        """One that is open, or that another process left in the store. Raises UnknownSessionError."""
        if session_id in self._sessions:
            return self._sessions[session_id]
        opening = self._opening.get(session_id)
        if opening is None:  # once, however many ask
            opening = self._opening[session_id] = asyncio.create_task(self._open(session_id, client))
            opening.add_done_callback(partial(self._opened, session_id))
        return await asyncio.shield(opening)

    async def session_now(self, session_id: str, client: Client) -> Session:
        """As `session`, and where another process went on with it, as that left it. Raises SlowStepError too."""
        session = await self.session(session_id, client)
        if not session.lock.locked():  # else it is in use here
            try:
                async with asyncio.timeout(self._settings.max_step_seconds), session.lock:
                    await self._look(session)
            except TimeoutError:
                raise SlowStepError("others were served first: send it again") from None
        return await self.session(session_id, client)

    async def _look(self, session: Session) -> None:
        """Drops it where another process went on with it. Raises UnknownSessionError where one ended it."""
        with self._in_store(session):
            if not await self._worker.run(partial(self._keeper.stands, session)):
                self._drop(session)

    async def _open(self, session_id: str, client: Client) -> Session:
        record, length = await self._worker.run(partial(self._keeper.found, session_id))
        with self._place(client):
            model = self.models.in_memory(record.model)
            if model is None:
                model = await self._load(self._loaders, partial(self.models.of_session, record.model))
            sampling, steps = SamplingConfig.model_validate_json(record.sampling), length - 1
            prompt = Picture(frame_from_png(record.prompt), record.prompt)
            found = Session(record.id, model, record.seed, sampling, prompt, steps, owner=client.name)
            found.picture = picture_of((await self.frames(found, steps, steps + 1))[0])
        self._sessions[session_id] = found
        return found

    def _opened(self, session_id: str, opening: asyncio.Task[Session]) -> None:
        del self._opening[session_id]
        if not opening.cancelled():
            opening.exception()  # who asked may have left: nobody else would take it

    @contextmanager
    def _in_store(self, session: Session) -> Iterator[None]:
        """What the store no longer has is open no more: another replica may have ended it."""
        try:
            yield
        except UnknownSessionError:
            self._drop(session)
            raise

    def _is_open(self, session: Session) -> bool:
        return self._sessions.get(session.id) is session

    def _drop(self, session: Session) -> None:
        """It is open no more: whoever asks for it next finds what the store has."""
        if self._is_open(session):
            del self._sessions[session.id]

    @contextmanager
    def _place(self, client: Client) -> Iterator[None]:
        """Holds a place for a session that is about to be open.

        Raises TooManySessionsError, and TooManySessionsOfClientError where the client has all that are theirs.
        """
        most = self._settings.max_sessions
        if self.num_sessions + self._starting.total() >= most:
            raise TooManySessionsError(f"all {most} sessions are taken: end one or try again later")
        own = [session.last_used for session in self._sessions.values() if session.owner == client.name]
        if client.sessions and len(own) + self._starting[client.name] >= client.sessions:
            idle = time.monotonic() - min(own, default=0.0)
            wait = max(math.ceil(self._settings.idle_seconds - idle + _ALONE_SECONDS), 1)  # until it is looked for
            raise TooManySessionsOfClientError(f"at most {client.sessions} sessions for each client: end one", wait)
        self._starting[client.name] += 1
        try:
            yield
        finally:
            self._starting -= Counter([client.name])  # drops what comes to nothing

    async def create(
        self, model: LoadedModel, frame_HWC: Pixels, seed: int | None, sampling: SamplingConfig, client: Client
    ) -> Session:
        """A world that starts at `frame_HWC`: uint8, of the model's frame size. Raises TooManySessionsError."""
        seed = secrets.randbelow(2**31) if seed is None else seed
        session = Session(secrets.token_urlsafe(12), model, seed, sampling, picture_of(frame_HWC), owner=client.name)
        with self._place(client):
            await self._worker.run_behind(partial(self._keeper.begin, session))
        self._sessions[session.id] = session
        return session

    async def step(
        self, session_id: str, actions: list[int], client: Client, expected: int | None = None, large: bool = False
    ) -> tuple[Session, int, Picture]:
        """Takes the actions, one after another: the session, its steps by then, and the frame they led to.

        `large`: that frame by the larger decoder, which from then on follows the session until a step comes without.

        `expected` is the number that the first of them is to get. Sent again after a lost answer, no step is taken
        twice, whichever process took it: what was taken already counts, the rest is taken. Raises UnknownSessionError,
        BadRequestError, NoLargeFramesError, TooManyRequestsError, and SessionMovedError where the session stands
        elsewhere, or came there by other actions.
        """
        session = await self.session(session_id, client)
        if expected not in (None, session.steps + 1):
            session = await self.session_now(session_id, client)
        try:
            return session, *await self._step(session, actions, expected, large)
        except SessionMovedError:
            if expected is None or self._is_open(session):
                raise
        session = await self.session(session_id, client)  # as another process left it
        return session, *await self._step(session, actions, expected, large)

    async def _step(
        self, session: Session, actions: list[int], expected: int | None, large: bool
    ) -> tuple[int, Picture]:
        num_actions = session.model.info.num_actions
        for action in actions:
            if not 0 <= action < num_actions:
                raise BadRequestError(f"actions must be from 0 to {num_actions - 1}, not {action}")
        if large:
            session.model.larger()
        if session.waiting >= self._settings.max_waiting:
            raise TooManyRequestsError(
                f"{session.waiting} requests of this session are waiting: send the next after an answer"
            )
        session.waiting += 1
        try:
            async with asyncio.timeout(self._settings.max_step_seconds), session.lock:
                if not self._is_open(session):
                    raise SessionMovedError(ELSEWHERE)
                taken = 0 if expected is None else session.steps + 1 - expected
                if taken and not (0 < taken <= len(actions) and await self._took(session, actions[:taken])):
                    raise SessionMovedError(f"this is not step {expected} again, and step {session.steps + 1} is next")
                if session.world is None or session.large != large:  # a window of frames to compute: others step
                    await self._wake(session, large)
                for action in actions[taken:]:
                    await self.passes.step(session, action)
                return await self.newest(session, large)
        except TimeoutError:
            raise SlowStepError("the step took too long: send it again, with its number") from None
        finally:
            session.waiting -= 1

    async def newest(self, session: Session, large: bool) -> tuple[int, Picture]:
        """Its steps so far, and the frame that they led to. Raises NoLargeFramesError."""
        steps, picture = session.steps, session.picture
        if not large:
            return steps, picture
        if picture.large is None:  # its passes draw none
            return steps, picture_of((await self.frames(session, steps, steps + 1, large))[0])
        return steps, picture.large

    async def _wake(self, session: Session, large: bool = False) -> None:
        try:
            with self._in_store(session):
                await self._in_pieces(self._keeper.waking(session))
                await self._in_pieces(self._keeper.sizing(session, large))
        except UnknownSessionError:
            raise SessionMovedError(ELSEWHERE) from None

    async def _in_pieces(self, work: Iterator[None]) -> None:
        while await self._worker.run_behind(partial(next, work, "done")) is None:
            pass

    async def _took(self, session: Session, actions: list[int]) -> bool:
        """Were these the session's last actions?"""
        last = partial(self._keeper.actions, session, session.steps + 1 - len(actions), session.steps + 1)
        with self._in_store(session):
            return await self._worker.run(last) == actions

    async def previews(self, session: Session, repeats: int) -> tuple[int, Pixels]:
        """The steps so far, and the frame that each action leads to when taken `repeats` times: uint8 (A, H, W, 3).

        The session itself stays where it is. Its own steps go first: then SessionMovedError is raised. Raises
        TooManyRequestsError where too many wait.
        """
        if session.previews_waiting >= _PREVIEWS:
            raise TooManyRequestsError("previews of this session are being drawn: ask again when they are there")
        actions = torch.arange(session.model.info.num_actions)
        session.previews_waiting += 1
        try:
            async with session.previewing:
                async with session.lock:
                    steps = session.steps
                    if session.world is None:
                        await self._wake(session)
                    copies = await self._worker.run_behind(partial(self._keeper.copies, session, len(actions)))
                for _ in range(repeats):
                    async with session.lock:
                        if session.steps != steps:
                            raise SessionMovedError("the session went on while its previews were drawn: ask again")
                        look = partial(session.model.genie.step, copies, actions, session.sampling)
                        frames_AHWC = await self._worker.run_behind(look)
            return steps, frames_AHWC.numpy()
        finally:
            session.previews_waiting -= 1

    async def rollout(
        self,
        model: LoadedModel,
        frame_HWC: Pixels,
        seed: int | None,
        sampling: SamplingConfig,
        actions: list[int],
        client: Client,
        gone: Callable[[], Awaitable[bool]],
        large: bool = False,
    ) -> Pixels:
        """The prompt and the frames after it: uint8 (T, H, W, 3). Players step in between.

        `large` ones are all by the larger decoder, the prompt's too. Raises BadRequestError, NoLargeFramesError, and as
        `LongJobs.turn`.
        """
        if max(actions) >= model.info.num_actions:
            raise BadRequestError(f"actions must be from 0 to {model.info.num_actions - 1}, not {max(actions)}")
        prompt_BTHWC = torch.from_numpy(frame_HWC.copy())[None, None]
        seed = secrets.randbelow(2**31) if seed is None else seed
        frames_THWC, past = self._room(len(actions) + 1, model, large), TemporalCache()
        async with self.long_jobs.turn(client, gone):
            state = await self._worker.run_behind(partial(model.genie.start, prompt_BTHWC, seed=seed))

            def dream(action: int | None) -> torch.Tensor:
                if action is not None:
                    model.genie.step(state, torch.tensor([action]), sampling)
                return model.larger().show(state.codes_BNC, past) if large else state.frame_BHWC.cpu()

            for t, action in enumerate((None, *actions)):
                await leave_if(gone)
                frames_THWC[t] = (await self._worker.run_behind(partial(dream, action)))[0].numpy()
        return frames_THWC

    async def infer(self, model: LoadedModel, frames_THWC: Pixels) -> list[int]:
        """The latent actions between the frames."""
        frames_BTHWC = torch.from_numpy(frames_THWC)[None]
        return (await self._worker.run_behind(partial(model.genie.infer_actions, frames_BTHWC)))[0].tolist()

    def _room(self, frames: int, model: LoadedModel, large: bool) -> Pixels:
        """For so many frames: uint8 (T, H, W, 3). Raises BadRequestError for too many, and NoLargeFramesError.

        One array from the start: small ones, kept between large ones that come and go, would tear the heap apart.
        """
        grid = (model.larger() if large else model.genie.tokenizer).grid
        most = max(self._settings.max_animation_pixels // (grid.height * grid.width), 1)
        if frames > most:
            raise BadRequestError(f"at most {most} frames of {grid.width} x {grid.height}, not {frames}")
        return np.empty((frames, grid.height, grid.width, 3), np.uint8)

    async def frames(self, session: Session, start: int, stop: int, large: bool = False) -> Pixels:
        """Frames start..stop of the session's past, frame 0 being the prompt: uint8 (T, H, W, 3).

        `large` ones are all by the larger decoder. Raises BadRequestError and NoLargeFramesError.
        """
        if not 0 <= start < stop <= session.steps + 1:
            raise BadRequestError(f"this session has frames 0 to {session.steps}, not {start} to {stop - 1}")
        frames_THWC = self._room(stop - start, session.model, large)
        pieces, painted = self._keeper.painting(session, start, stop, large), 0
        with self._in_store(session):
            while (piece := await self._worker.run_behind(partial(next, pieces, None))) is not None:
                for frame_HWC in piece:
                    frames_THWC[painted] = frame_HWC
                    painted += 1
        return frames_THWC

    async def branch(self, session: Session, t: int, client: Client) -> Session:
        """A new session that shares this one's frames up to t, its seed and its model, and goes on by itself."""
        if not 0 <= t <= session.steps:
            raise BadRequestError(f"this session has frames 0 to {session.steps}, not {t}")
        with self._place(client):
            (frame_HWC,) = await self.frames(session, t, t + 1)
            of_session = session.model, session.seed, session.sampling, picture_of(frame_HWC)
            branch = Session(secrets.token_urlsafe(12), *of_session, steps=t, owner=client.name)
            with self._in_store(session):
                await self._in_pieces(self._keeper.branching(session, branch))
        self._sessions[branch.id] = branch
        return branch

    async def delete(self, session_id: str) -> None:
        """Raises UnknownSessionError."""
        deleted = await self._worker.run(partial(self._keeper.store.delete, session_id))
        if opening := self._opening.get(session_id):  # it may have been found before
            with suppress(ServiceError):
                await asyncio.shield(opening)
        self._sessions.pop(session_id, None)
        if not deleted:
            raise UnknownSessionError(ENDED)

    async def expire_idle(self) -> None:
        """Ends sessions that nobody has stepped for `idle_seconds`, and parks the idle; runs until cancelled."""
        while True:
            await asyncio.sleep(min(self._settings.idle_seconds / 4, _ALONE_SECONDS))
            try:
                await self._expire()
            except Exception:  # the next round tries again; without rounds no place would ever be free
                log.exception("idle sessions could not be ended")

    async def _expire(self) -> None:
        now = time.monotonic()
        for session in list(self._sessions.values()):
            idle = now - session.last_used
            if idle > self._settings.idle_seconds:
                self._drop(session)
            elif idle > _ALONE_SECONDS and not session.waiting:
                async with session.lock:
                    with suppress(UnknownSessionError), self._in_store(session):
                        await self._worker.run(partial(self._keeper.tidy, session, idle > _PARK_SECONDS))
        await self._worker.run(self._keeper.store.delete_expired)
