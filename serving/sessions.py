"""Sessions as the worker thread sees them: their worlds in memory, their frames in the store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from genie_model.config import SamplingConfig
from genie_model.genie import NO_ACTION, PlayState
from genie_model.layers import TemporalCache
from serving import worlds
from serving.errors import UnknownSessionError
from serving.images import Picture, Pixels, frame_from_png, picture_of
from serving.model import LoadedModel
from serving.schemas import SessionInfo
from serving.store import Frame, SessionRecord, SessionStore
from serving.worlds import World

FEW = 2  # players who leave a core to requests
_PAINTED, _REPLAYED, _COPIED = 8, 4, 500  # frames at once: some 20 ms of `demo`, then others step
ELSEWHERE = "this session ended or went on elsewhere: ask where it stands"
ENDED = "this session does not exist or has ended: create a new one"


@dataclass(eq=False)
class Session:
    """One player's world: it keeps the model it began with until it ends."""

    id: str
    model: LoadedModel
    seed: int
    sampling: SamplingConfig
    picture: Picture  # the newest frame
    steps: int = 0
    owner: str = ""  # the client among whose sessions it counts
    world: World | None = None  # None: parked, its frames are in the store
    last_used: float = field(default_factory=time.monotonic)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    previewing: asyncio.Lock = field(default_factory=asyncio.Lock)
    previews_waiting: int = 0
    waiting: int = 0  # requests that wait for the lock, or have it

    @property
    def large(self) -> bool:
        """Whether its passes draw large frames too."""
        return self.world is not None and self.world.state.large is not None

    def info(self) -> SessionInfo:
        return SessionInfo(
            id=self.id,
            model=self.model.info,
            seed=self.seed,
            steps=self.steps,
            temperature=self.sampling.temperature,
            maskgit_steps=self.sampling.maskgit_steps,
        )


class Keeper:
    """What is done to sessions in the one worker thread: everything that touches torch or the store."""

    def __init__(self, store: SessionStore, threads: int) -> None:
        """`threads` are the model's for a pass of many; with a few players one is left to requests, or they wait."""
        self.store, self._threads = store, threads

    def begin(self, session: Session) -> None:
        """Starts its world at its frame."""
        prompt_BTHWC = torch.from_numpy(session.picture.frame_HWC.copy())[None, None]
        session.world = World(session.model.genie.start(prompt_BTHWC, seed=session.seed))
        first = Frame(session.id, 0, NO_ACTION, session.world.state.codes_BNC[0].cpu().numpy())
        self.store.create(self._record(session, session.picture.png), [first])

    def step(self, sessions: list[Session], actions: list[int], show: Callable[[list[Picture | None]], object]) -> None:
        """One pass for sessions of one model that sample alike: each one's next frame, in the store before it is shown.

        None for a session that ended, or that another process stepped meanwhile. `steps` are not moved on. What the
        next pass will need of these frames is computed once they are shown; they are packed before, for then the event
        loop has less to do beside the model, which it would hold up.
        """
        awake = []
        for session, action in zip(sessions, actions, strict=True):
            with suppress(UnknownSessionError):
                awake.append((session, action, self.wake(session)))
        if not awake:
            show([None] * len(sessions))
            return
        torch.set_num_threads(max(self._threads - (len(awake) <= FEW), 1))
        model, sampling = sessions[0].model, sessions[0].sampling
        stepping, taken = [world for *_, world in awake], [action for _, action, _ in awake]
        found = worlds.step(model.genie, stepping, taken, sampling, model.large)
        frames = [
            Frame(session.id, session.steps + 1, action, codes_NC)
            for (session, action, _), (*_, codes_NC) in zip(awake, found, strict=True)
        ]
        kept = self.store.append(frames)
        seen = {
            session: picture_of(frame_HWC, large_HWC)
            for (session, *_), (frame_HWC, large_HWC, _), mine in zip(awake, found, kept, strict=True)
            if mine
        }
        show([seen.get(session) for session in sessions])
        worlds.remember(model.genie, stepping)

    def wake(self, session: Session) -> World:
        """Brings a parked world back, from the tokens of the last frames that matter. Raises UnknownSessionError."""
        for _ in self.waking(session):
            pass
        assert session.world is not None
        return session.world

    def waking(self, session: Session) -> Iterator[None]:
        """`wake` in pieces, so that others step in between."""
        if session.world is None:
            genie = session.model.genie
            kept = self._kept(session, max(session.steps + 1 - genie.memory, 0), session.steps + 1)
            actions_1T = torch.tensor([[frame.action for frame in kept]])
            states = genie.resuming(_codes(kept), actions_1T, [session.seed], [session.steps + 1])
            for replayed, state in enumerate(states, 1):
                world = World(state)
                if replayed % _REPLAYED == 0:
                    yield
            session.world = world

    def sizing(self, session: Session, large: bool) -> Iterator[None]:
        """From now on its passes draw large frames too, or do no more; in pieces.

        What the larger decoder has to know of the past comes from the store, so a session that wants no large frames
        keeps nothing for it. Raises UnknownSessionError.
        """
        world, cache = self.wake(session), None
        if session.large == large:
            return
        if large:
            decoder = session.model.larger()
            first = max(session.steps + 1 - decoder.picture_memory, 0)
            codes_1TNC, cache = _codes(self._kept(session, first, session.steps + 1)), TemporalCache([first])
            for replayed, frame_1HWC in enumerate(decoder.painting(codes_1TNC, cache), 1):
                large_HWC = frame_1HWC[0].numpy()
                if replayed % _REPLAYED == 0:
                    yield
            session.picture = replace(session.picture, large=picture_of(large_HWC))
        alone = world.state.take([world.row])
        alone.large = cache
        session.world = World(alone)

    def tidy(self, session: Session, park: bool) -> None:
        """Of an idle session: its world leaves memory, or all that it last stepped beside does.

        Raises UnknownSessionError where it was ended elsewhere.
        """
        if park:
            session.world = None
        elif session.world is not None and len(session.world.state.seeds) > 1:
            session.world = World(session.world.state.take([session.world.row]))
        self._prompt(session)

    def copies(self, session: Session, times: int) -> PlayState:
        """Its world so many times side by side."""
        world = self.wake(session)
        return replace(world.state, large=None).take([world.row] * times)

    def painting(self, session: Session, start: int, stop: int, large: bool = False) -> Iterator[list[Pixels]]:
        """Frames start..stop as they were seen, in pieces; frame 0 is the prompt itself, unless it is to be `large`.

        Raises UnknownSessionError, and NoLargeFramesError.
        """
        painter = session.model.larger() if large else session.model.genie
        first = max(start + 1 - painter.picture_memory, 0)
        codes_1TNC = _codes(self._kept(session, first, stop))
        piece: list[Pixels] = []
        for t, frame_1HWC in enumerate(painter.painting(codes_1TNC, TemporalCache([first])), first):
            if t >= start:
                piece.append(frame_1HWC[0].numpy() if t or large else frame_from_png(self._prompt(session)))
            if (t - first) % _PAINTED == _PAINTED - 1:
                yield piece
                piece = []
        yield piece

    def branching(self, session: Session, branch: Session) -> Iterator[None]:
        """Copies the session's frames up to where `branch` stands into that, in pieces. Raises UnknownSessionError."""
        for begin in range(0, branch.steps + 1, _COPIED):
            kept = self._kept(session, begin, min(begin + _COPIED, branch.steps + 1))
            copies = [Frame(branch.id, frame.t, frame.action, frame.codes_NC) for frame in kept]
            if begin == 0:
                self.store.create(self._record(branch, self._prompt(session)), copies)
            elif not all(self.store.append(copies)):
                raise UnknownSessionError(ENDED)
            yield

    def found(self, session_id: str) -> tuple[SessionRecord, int]:
        """What a process left in the store, and how many frames there are of it. Raises UnknownSessionError."""
        found = self.store.reopen(session_id)
        if found is None:
            raise UnknownSessionError(ENDED)
        return found

    def stands(self, session: Session) -> bool:
        """Whether its newest frame is the store's too. Raises UnknownSessionError."""
        return len(self._kept(session, session.steps, session.steps + 1, most=session.steps + 2)) == 1

    def actions(self, session: Session, start: int, stop: int) -> list[int]:
        """Those that led to frames start..stop."""
        return [frame.action for frame in self._kept(session, start, stop)]

    def _kept(self, session: Session, start: int, stop: int, most: int | None = None) -> list[Frame]:
        """Frames start..stop, and up to `most` where there are any. Raises UnknownSessionError."""
        tokenizer = session.model.genie.tokenizer
        shape = (tokenizer.num_patches, tokenizer.config.codes_per_patch)
        found = self.store.frames(session.id, shape, start, most or stop)
        if len(found) < stop - start:
            raise UnknownSessionError(ENDED)
        return found

    def _prompt(self, session: Session) -> bytes:
        record = self.store.record(session.id)
        if record is None:
            raise UnknownSessionError(ENDED)
        return record.prompt

    def _record(self, session: Session, prompt: bytes) -> SessionRecord:
        info = session.model.info
        return SessionRecord(
            session.id, info.name, info.version, info.run_id, session.model.folder, session.seed,
            session.sampling.model_dump_json(), prompt,
        )  # fmt: skip


def _codes(frames: list[Frame]) -> torch.Tensor:
    """(1, T, N, C), int64."""
    return torch.from_numpy(np.stack([frame.codes_NC for frame in frames]).astype(np.int64))[None]
