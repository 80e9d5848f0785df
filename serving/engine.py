"""Sessions, and the one thread in which the model works.

All sessions live on the event loop, so they need no locks among themselves. Everything that touches torch or the
store runs in one worker thread: the event loop never blocks, and a model's state is never used twice at once. Players
who wait at the same time step in one pass of the model. A session has a lock too, so that it holds at most one place
in the queue and no player can crowd out the others.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from genie_model.config import SamplingConfig
from serving.errors import (
    BadRequestError,
    BusyError,
    NotReadyError,
    PassFailedError,
    ServiceError,
    SessionMovedError,
    StoreError,
    TooManySessionsError,
    UnknownSessionError,
)
from serving.images import Pixels
from serving.metrics import Metrics
from serving.model import LoadedModel, ModelSource, load, warm
from serving.schemas import ModelVersionInfo
from serving.sessions import ENDED, Keeper, Session
from serving.settings import Settings
from serving.store import open_store

log = logging.getLogger(__name__)
T = TypeVar("T")
_ELSEWHERE = "this session ended or went on elsewhere: ask where it stands"
_FRAMES_AT_ONCE = 32  # of a past that is painted again: players step in between
_PREVIEWS = 3  # requests for them that one session may have
_GATHER_SECONDS = 0.005  # how long a pass waits for players who just stepped
_RECENT_SECONDS = 0.25
_ALONE_SECONDS = 2.0  # a world nobody steps for so long no longer holds on to those it stepped beside
_PARK_SECONDS = 30.0  # a world nobody steps for so long leaves memory; its tokens bring it back


@dataclass(eq=False)
class _Step:
    """A step that waits for its pass."""

    session: Session
    action: int
    done: asyncio.Future[Pixels]
    came: float = field(default_factory=time.perf_counter)


class Engine:
    """Follows the champion and plays sessions."""

    def __init__(self, settings: Settings, source: ModelSource, metrics: Metrics) -> None:
        """Raises ValueError when the store cannot be used."""
        self._metrics = metrics
        self._settings = settings
        self._source = source
        self._keeper = Keeper(open_store(settings.session_store, settings.idle_seconds), source)
        self._model: LoadedModel | None = None
        self._problem = "the model is loading"
        self._sessions: dict[str, Session] = {}
        self._starting = 0
        self._steps: list[_Step] = []
        self._step_came = asyncio.Event()
        self._rolling = asyncio.Semaphore(1)  # rollouts at once: players go first
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
        if self._model and self._model.is_of(version):
            return
        began = time.perf_counter()
        model = load(version)
        self._worker.submit(warm, model).result()
        if self._model:
            self._metrics.serving.remove(self._model.info.name, self._model.info.version)
        self._model = self._keeper.models[model.identity] = model
        self._metrics.serving.labels(model.info.name, model.info.version).set(1)
        self._metrics.reloads.labels("loaded").inc()
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
                    self._metrics.reloads.labels("refused").inc()
                    log.warning("no new model: %s", error)
            self._stopped.wait(self._settings.poll_seconds)

    def close(self) -> None:
        self._stopped.set()
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._keeper.store.close()

    # ---- the sessions

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    @property
    def num_waiting(self) -> int:
        """Steps that wait for a pass."""
        return len(self._steps)

    async def session(self, session_id: str) -> Session:
        """One that is open, or that another process left in the store. Raises UnknownSessionError."""
        if session_id not in self._sessions:
            with self._place():
                found = await self._run(partial(self._keeper.reopen, session_id))
            self._sessions.setdefault(session_id, found)
        return self._sessions[session_id]

    @contextmanager
    def _place(self) -> Iterator[None]:
        """Holds a place for a session that is about to be open. Raises TooManySessionsError."""
        most = self._settings.max_sessions
        if self.num_sessions + self._starting >= most:
            raise TooManySessionsError(f"all {most} sessions are taken: end one or try again later")
        self._starting += 1
        try:
            yield
        finally:
            self._starting -= 1

    async def create(
        self, model: LoadedModel, frame_HWC: Pixels, seed: int | None, sampling: SamplingConfig | None = None
    ) -> Session:
        """A world that starts at `frame_HWC`: uint8, of the model's frame size. Raises TooManySessionsError."""
        seed = secrets.randbelow(2**31) if seed is None else seed
        session = Session(secrets.token_urlsafe(12), model, seed, sampling or model.genie.config.sampling, frame_HWC)
        with self._place():
            await self._run(partial(self._keeper.begin, session))
        self._sessions[session.id] = session
        return session

    async def step(self, session: Session, action: int, expected: int | None = None) -> tuple[int, Pixels]:
        """Takes `action`; returns the steps so far and the frame they led to, (H, W, 3).

        `expected` is the number that this step is to get. Sent again after a lost answer, the step is not taken twice:
        its frame is the answer. Raises BadRequestError, BusyError, and SessionMovedError where `expected` is another.
        """
        num_actions = session.model.info.num_actions
        if not 0 <= action < num_actions:
            raise BadRequestError(f"action must be from 0 to {num_actions - 1}, not {action}")
        if session.waiting >= self._settings.max_waiting:
            raise BusyError(f"{session.waiting} requests of this session are waiting: send the next after an answer")
        session.waiting += 1
        try:
            async with session.lock:
                if self._sessions.get(session.id) is not session:
                    raise SessionMovedError(_ELSEWHERE)
                if expected is not None and expected != session.steps + 1:
                    if expected == session.steps > 0 and action == session.last_action:
                        return session.steps, session.frame_HWC
                    raise SessionMovedError(f"this is not step {expected} again, and step {session.steps + 1} is next")
                waiting = _Step(session, action, asyncio.get_running_loop().create_future())
                self._steps.append(waiting)
                self._step_came.set()
                frame_HWC = await waiting.done
                return session.steps, frame_HWC
        finally:
            session.waiting -= 1

    async def play(self) -> None:
        """Steps all that wait, pass after pass; runs until cancelled."""
        while True:
            await self._step_came.wait()
            await self._gather()
            batch = self._next_batch()
            self._steps = [step for step in self._steps if step not in batch]
            if not self._steps:
                self._step_came.clear()
            actions, began = [step.action for step in batch], time.perf_counter()
            try:
                frames = await self._run(partial(self._keeper.step, [step.session for step in batch], actions))
            except StoreError as error:  # the store alone knows whether the step is in
                for step in batch:
                    self._forget(step, error)
                continue
            except Exception:  # the tokens in the store bring their worlds back
                log.exception("a pass of the model failed")
                for step in batch:
                    step.session.world = None
                    if not step.done.done():
                        step.done.set_exception(PassFailedError("the model failed at this step: send it again"))
                continue
            self._measured(batch, began, time.perf_counter())
            for step, frame_HWC in zip(batch, frames, strict=True):
                if frame_HWC is None:
                    self._forget(step, SessionMovedError(_ELSEWHERE))
                    continue
                step.session.frame_HWC, step.session.last_action = frame_HWC, step.action
                step.session.steps += 1
                step.session.last_used = time.monotonic()
                if not step.done.done():  # its player may have gone
                    step.done.set_result(frame_HWC)

    def _forget(self, step: _Step, error: ServiceError) -> None:
        """Its session is open no more: whoever asks for it next finds what the store has."""
        if self._sessions.get(step.session.id) is step.session:
            del self._sessions[step.session.id]
        step.session.world = None  # it may be ahead of the store
        if not step.done.done():
            step.done.set_exception(error)

    def _measured(self, batch: list[_Step], began: float, ended: float) -> None:
        metrics = self._metrics
        metrics.batch_size.observe(len(batch))
        metrics.frames.inc(len(batch))
        metrics.phase_seconds.labels("model").observe(ended - began)
        for step in batch:
            metrics.phase_seconds.labels("queue").observe(began - step.came)
            metrics.phase_seconds.labels("total").observe(ended - step.came)

    def _next_batch(self) -> list[_Step]:
        """Of those that wait, the first, and what can share its pass: at most one step of each session."""
        first, batch = self._steps[0].session, dict[str, _Step]()
        for step in self._steps:
            alike = step.session.model is first.model and step.session.sampling == first.sampling
            if alike and len(batch) < self._settings.max_batch:
                batch.setdefault(step.session.id, step)
        return list(batch.values())

    async def previews(self, session: Session, repeats: int) -> tuple[int, Pixels]:
        """The steps so far, and the frame that each action leads to when taken `repeats` times: uint8 (A, H, W, 3).

        The session itself stays where it is. Its own steps go first: then SessionMovedError is raised. Raises BusyError
        where too many wait.
        """
        if session.previews_waiting >= _PREVIEWS:
            raise BusyError("previews of this session are being drawn: ask again when they are there")
        actions = torch.arange(session.model.info.num_actions)
        session.previews_waiting += 1
        try:
            async with session.previewing:
                async with session.lock:
                    steps, copies = session.steps, await self._run(partial(self._keeper.copies, session, len(actions)))
                for _ in range(repeats):
                    async with session.lock:
                        if session.steps != steps:
                            raise SessionMovedError("the session went on while its previews were drawn: ask again")
                        look = partial(session.model.genie.step, copies, actions, session.sampling)
                        frames_AHWC = await self._run(look)
            return steps, frames_AHWC.numpy()
        finally:
            session.previews_waiting -= 1

    async def rollout(
        self, model: LoadedModel, frame_HWC: Pixels, seed: int | None, sampling: SamplingConfig, actions: list[int]
    ) -> Pixels:
        """The prompt and the frames after it: uint8 (T, H, W, 3). Players step in between. Raises BadRequestError."""
        if max(actions) >= model.info.num_actions:
            raise BadRequestError(f"actions must be from 0 to {model.info.num_actions - 1}, not {max(actions)}")
        prompt_BTHWC = torch.from_numpy(frame_HWC.copy())[None, None]
        seed = secrets.randbelow(2**31) if seed is None else seed
        async with self._rolling:
            state = await self._run(partial(model.genie.start, prompt_BTHWC, seed=seed))
            frames = [frame_HWC]
            for action in actions:
                frame_BHWC = await self._run(partial(model.genie.step, state, torch.tensor([action]), sampling))
                frames.append(frame_BHWC[0].numpy())
        return np.stack(frames)

    async def infer(self, model: LoadedModel, frames_THWC: Pixels) -> list[int]:
        """The latent actions between the frames."""
        frames_BTHWC = torch.from_numpy(frames_THWC)[None]
        return (await self._run(partial(model.genie.infer_actions, frames_BTHWC)))[0].tolist()

    def versions(self) -> list[ModelVersionInfo]:
        """All that the source knows of. Raises ValueError when it cannot be asked."""
        return self._source.versions()

    async def frames(self, session: Session, start: int, stop: int) -> Pixels:
        """Frames start..stop of the session's past, frame 0 being the prompt: uint8 (T, H, W, 3)."""
        if not 0 <= start < stop <= session.steps + 1:
            raise BadRequestError(f"this session has frames 0 to {session.steps}, not {start} to {stop - 1}")
        parts = [
            await self._run(partial(self._keeper.past_frames, session, begin, min(begin + _FRAMES_AT_ONCE, stop)))
            for begin in range(start, stop, _FRAMES_AT_ONCE)
        ]
        return np.concatenate(parts)

    async def branch(self, session: Session, t: int) -> Session:
        """A new session that shares this one's frames up to t, its seed and its model, and goes on by itself."""
        if not 0 <= t <= session.steps:
            raise BadRequestError(f"this session has frames 0 to {session.steps}, not {t}")
        with self._place():
            branch = await self._run(partial(self._keeper.branch, session, t, secrets.token_urlsafe(12)))
        self._sessions[branch.id] = branch
        return branch

    async def delete(self, session_id: str) -> None:
        """Raises UnknownSessionError."""
        self._sessions.pop(session_id, None)
        if not await self._run(partial(self._keeper.store.delete, session_id)):
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
                self._sessions.pop(session.id, None)
            elif idle > _ALONE_SECONDS and not session.waiting:
                async with session.lock:
                    shrink = self._keeper.park if idle > _PARK_SECONDS else self._keeper.leave_batch
                    await self._run(partial(shrink, session))
        await self._run(self._keeper.store.delete_expired)

    async def _gather(self) -> None:
        """Waits a moment for players who just got a frame: their next step would come right after the pass began."""
        began = time.monotonic()
        while time.monotonic() - began < _GATHER_SECONDS:
            waiting = {step.session.id for step in self._steps}
            recent = began - _RECENT_SECONDS
            if all(s.id in waiting or s.last_used < recent or not s.steps for s in self._sessions.values()):
                return
            await asyncio.sleep(0.001)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)
