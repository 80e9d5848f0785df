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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
    SessionMovedError,
    TooManySessionsError,
    UnknownSessionError,
)
from serving.images import Pixels
from serving.metrics import Metrics
from serving.model import LoadedModel, ModelSource, load, warm
from serving.schemas import ModelVersionInfo
from serving.sessions import ENDED, Keeper, Session
from serving.settings import Settings
from serving.store import SessionStore

log = logging.getLogger(__name__)
T = TypeVar("T")
_GATHER_SECONDS = 0.005  # how long a pass waits for players who just stepped
_RECENT_SECONDS = 0.25
_ALONE_SECONDS = 2.0  # a world nobody steps for so long no longer holds on to those it stepped beside
_PARK_SECONDS = 30.0  # a world nobody steps for so long leaves memory; its tokens bring it back


@dataclass
class _Step:
    """A step that waits for its pass."""

    session: Session
    action: int
    done: asyncio.Future[Pixels]
    came: float = field(default_factory=time.perf_counter)


class Engine:
    """Follows the champion and plays sessions."""

    def __init__(self, settings: Settings, source: ModelSource, metrics: Metrics) -> None:
        """Raises ValueError when the store's file cannot be used."""
        self._metrics = metrics
        self._settings = settings
        self._source = source
        self._keeper = Keeper(SessionStore(settings.session_store), source)
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
        self._model = model
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
            found = await self._run(partial(self._keeper.reopen, session_id, self._loaded()))
            if found is None:
                raise UnknownSessionError(ENDED)
            self._sessions.setdefault(session_id, found)
        return self._sessions[session_id]

    def _loaded(self) -> list[LoadedModel]:
        """The models in memory."""
        return [model for model in (self._model, *(session.model for session in self._sessions.values())) if model]

    async def create(
        self, model: LoadedModel, frame_HWC: Pixels, seed: int | None, sampling: SamplingConfig | None = None
    ) -> Session:
        """A world that starts at `frame_HWC`: uint8, of the model's frame size. Raises TooManySessionsError."""
        if self.num_sessions + self._starting >= self._settings.max_sessions:
            raise TooManySessionsError(
                f"all {self._settings.max_sessions} sessions are taken: end one or try again later"
            )
        seed = secrets.randbelow(2**31) if seed is None else seed
        session = Session(secrets.token_urlsafe(12), model, seed, sampling or model.genie.config.sampling, frame_HWC)
        self._starting += 1
        try:
            await self._run(partial(self._keeper.begin, session))
        finally:
            self._starting -= 1
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
                if session.id not in self._sessions:
                    raise UnknownSessionError(ENDED)
                if expected is not None and expected != session.steps + 1:
                    if expected == session.steps > 0:
                        return session.steps, session.frame_HWC
                    raise SessionMovedError(f"step {expected} was asked for, but step {session.steps + 1} is next")
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
            except Exception as error:  # told to those who wait; the tokens in the store bring their worlds back
                for step in batch:
                    step.session.world = None
                    if not step.done.done():
                        step.done.set_exception(error)
                continue
            self._measured(batch, began, time.perf_counter())
            for step, frame_HWC in zip(batch, frames, strict=True):
                if frame_HWC is None:
                    self._sessions.pop(step.session.id, None)  # whoever asks for it next finds what the store has
                    moved = SessionMovedError("this session ended or went on elsewhere: ask where it stands")
                    if not step.done.done():
                        step.done.set_exception(moved)
                    continue
                step.session.frame_HWC = frame_HWC
                step.session.steps += 1
                step.session.last_used = time.monotonic()
                if not step.done.done():  # its player may have gone
                    step.done.set_result(frame_HWC)

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

    async def previews(self, session: Session, repeats: int) -> Pixels:
        """The frame that each action leads to when taken `repeats` times from here: uint8 (A, H, W, 3).

        The session itself stays where it is. Its own steps go first: then SessionMovedError is raised.
        """
        actions = torch.arange(session.model.info.num_actions)
        async with session.lock:
            steps, copies = session.steps, await self._run(partial(self._keeper.copies, session, len(actions)))
        for _ in range(repeats):
            async with session.lock:
                if session.steps != steps:
                    raise SessionMovedError("the session went on while its previews were drawn: ask again")
                frames_AHWC = await self._run(partial(session.model.genie.step, copies, actions, session.sampling))
        return frames_AHWC.numpy()

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
        return await self._run(partial(self._keeper.past_frames, session, start, stop))

    async def branch(self, session: Session, t: int) -> Session:
        """A new session that shares this one's frames up to t, its seed and its model, and goes on by itself."""
        if not 0 <= t <= session.steps:
            raise BadRequestError(f"this session has frames 0 to {session.steps}, not {t}")
        if self.num_sessions + self._starting >= self._settings.max_sessions:
            raise TooManySessionsError(f"all {self._settings.max_sessions} sessions are taken: end one first")
        new_id = secrets.token_urlsafe(12)
        branch = await self._run(partial(self._keeper.branch, session, t, new_id))
        self._sessions[branch.id] = branch
        return branch

    async def delete(self, session_id: str) -> None:
        """Raises UnknownSessionError."""
        session = await self.session(session_id)
        self._sessions.pop(session.id, None)
        await self._run(partial(self._keeper.store.delete, [session.id]))

    async def expire_idle(self) -> None:
        """Ends sessions that nobody has stepped for `idle_seconds`, and parks the idle; runs until cancelled."""
        while True:
            await asyncio.sleep(min(self._settings.idle_seconds / 4, _ALONE_SECONDS))
            now = time.monotonic()
            for session in list(self._sessions.values()):
                if now - session.last_used > self._settings.idle_seconds:
                    await self.delete(session.id)
                elif now - session.last_used > _PARK_SECONDS and not session.waiting:
                    session.world = None
                elif now - session.last_used > _ALONE_SECONDS and not session.waiting:
                    async with session.lock:
                        await self._run(partial(self._keeper.leave_batch, session))
            store, oldest = self._keeper.store, time.time() - self._settings.idle_seconds
            forgotten = await self._run(partial(store.unused_since, oldest))
            await self._run(partial(store.delete, [id for id in forgotten if id not in self._sessions]))

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
