"""The one thread in which the model works, and the passes in which players who wait at the same time step together."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar
from weakref import WeakSet

from serving.errors import PassFailedError, ServiceError, SessionMovedError, SlowStepError, StoreError
from serving.images import Picture
from serving.metrics import Metrics
from serving.sessions import ELSEWHERE, Keeper, Session
from serving.settings import Settings
from serving.traces import tracer

log = logging.getLogger(__name__)
T = TypeVar("T")
_GATHER_SECONDS = 0.02  # after a pass, for the next steps of those who shared it: then they share this one too


class Worker:
    """All that touches torch or the store runs here, so that no model's state is used twice at once."""

    def __init__(self, settings: Settings) -> None:
        self._seconds = settings.max_step_seconds
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._behind = asyncio.Semaphore(1)

    async def run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def run_behind(self, work: Callable[[], T]) -> T:
        """What takes a while: one such work at a time, so that at most one lies before a pass. Raises SlowStepError."""
        try:
            async with asyncio.timeout(self._seconds):
                await self._behind.acquire()
        except TimeoutError:
            raise SlowStepError("others were served first: send it again") from None
        try:
            return await self.run(work)
        finally:
            self._behind.release()

    def run_from_thread(self, work: Callable[[], T]) -> T:
        """Of another thread, which waits for it."""
        return self._thread.submit(work).result()

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)


@dataclass(eq=False)
class _Step:
    """A step that waits for its pass."""

    session: Session
    action: int
    done: asyncio.Future[None]
    number: int  # that it is to get
    came: float = field(default_factory=time.perf_counter)


class Passes:
    """Steps all that wait, pass after pass."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        worker: Worker,
        keeper: Keeper,
        is_open: Callable[[Session], bool],
        drop: Callable[[Session], None],
    ) -> None:
        """`drop` is told of sessions that are open here no more."""
        self._max_batch, self._metrics = settings.max_batch, metrics
        self._worker, self._keeper = worker, keeper
        self._is_open, self._drop = is_open, drop
        self._steps: list[_Step] = []
        self._step_came = asyncio.Event()
        self._passed = WeakSet[Session]()  # shared the last pass, which ended then
        self._ended = 0.0

    @property
    def num_waiting(self) -> int:
        return len(self._steps)

    async def step(self, session: Session, action: int) -> None:
        """Returns once the session stands a step further. Raises what stopped it."""
        step = _Step(session, action, asyncio.get_running_loop().create_future(), session.steps + 1)
        self._steps.append(step)
        self._step_came.set()
        try:
            await step.done
        finally:
            if step in self._steps:  # nobody waits for it any more
                self._steps.remove(step)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            if not self._steps:
                await self._another()
            await self._gather()
            await self._pass()

    async def _another(self) -> None:
        """Waits for one more step to come."""
        self._step_came.clear()
        await self._step_came.wait()

    async def _gather(self) -> None:
        """Waits a moment for players who just got a frame: their next step would come right after the pass began."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._ended + _GATHER_SECONDS - time.perf_counter()):
                while self._to_come():
                    await self._another()

    def _to_come(self) -> bool:
        """Whether one of them may send a step that shares the next pass."""
        waiting = {step.session for step in self._steps}
        return bool(waiting) and any(
            session not in waiting and self._is_open(session) and self._share(session) for session in self._passed
        )

    async def _pass(self) -> None:
        """One pass of the model, for the first that waits and all that can share it."""
        for step in self._steps:  # one that was sent again while the pass that took it went on
            if step.number != step.session.steps + 1 and not step.done.done():
                step.done.set_exception(SessionMovedError(ELSEWHERE))
        self._steps = [step for step in self._steps if not step.done.done()]
        batch = self._next_batch()
        self._steps = [step for step in self._steps if step not in batch]
        if not batch:
            return
        sessions, actions = [step.session for step in batch], [step.action for step in batch]
        loop, began = asyncio.get_running_loop(), time.perf_counter()
        frames: asyncio.Future[list[Picture | None]] = loop.create_future()

        def shown(found: list[Picture | None]) -> None:
            if not frames.done():  # else the service ends
                frames.set_result(found)

        def show(found: list[Picture | None]) -> None:  # in the worker's thread
            loop.call_soon_threadsafe(shown, found)

        working = asyncio.ensure_future(self._worker.run(partial(self._keeper.step, sessions, actions, show)))
        try:
            with tracer.start_as_current_span("pass of the model", attributes={"worlds": len(batch)}):
                await asyncio.wait((frames, working), return_when=asyncio.FIRST_COMPLETED)
                if not frames.done():
                    await working  # which says why
        except StoreError as error:  # the store alone knows whether the step is in
            for step in batch:
                self._forget(step, error)
            return
        except Exception:  # the tokens in the store bring their worlds back
            log.exception("a pass of the model failed")
            for step in batch:
                step.session.world = None
                if not step.done.done():
                    step.done.set_exception(PassFailedError("the model failed at this step: send it again"))
            return
        self._passed, self._ended = WeakSet(sessions), time.perf_counter()
        self._measured(batch, began, self._ended)
        for step, picture in zip(batch, frames.result(), strict=True):
            if picture is None:
                self._forget(step, SessionMovedError(ELSEWHERE))
                continue
            step.session.picture = picture
            step.session.steps += 1
            step.session.last_used = time.monotonic()
            if not step.done.done():  # its player may have gone
                step.done.set_result(None)
        try:  # while the frames go out and the next keys come in
            await working
        except Exception:  # the next step of each tries again
            log.exception("frames could not be remembered")

    def _next_batch(self) -> list[_Step]:
        """Of those that wait, the first, and what can share its pass: at most one step of each session."""
        batch = dict[str, _Step]()
        for step in self._steps:
            if self._share(step.session) and len(batch) < self._max_batch:
                batch.setdefault(step.session.id, step)
        return list(batch.values())

    def _share(self, session: Session) -> bool:
        """Whether it can step in the pass of the first that waits."""
        first = self._steps[0].session
        same = session.model is first.model and session.large == first.large
        return same and session.sampling == first.sampling

    def _forget(self, step: _Step, error: ServiceError) -> None:
        """Drops its session, and answers it."""
        self._drop(step.session)
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
