"""Sessions as the worker thread sees them: their worlds in memory, their frames in the store."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch

from genie_model.config import SamplingConfig
from genie_model.genie import NO_ACTION, PlayState
from serving import worlds
from serving.errors import UnknownSessionError
from serving.images import Pixels, frame_from_png, png
from serving.model import LoadedModel
from serving.schemas import SessionInfo
from serving.store import Frame, SessionRecord, SessionStore
from serving.worlds import World

_FEW = 2
ENDED = "this session does not exist or has ended: create a new one"


@dataclass(eq=False)
class Session:
    """One player's world: it keeps the model it began with until it ends."""

    id: str
    model: LoadedModel
    seed: int
    sampling: SamplingConfig
    frame_HWC: Pixels
    steps: int = 0
    owner: str = ""  # the client among whose sessions it counts
    world: World | None = None  # None: parked, its frames are in the store
    last_used: float = field(default_factory=time.monotonic)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    previewing: asyncio.Lock = field(default_factory=asyncio.Lock)
    previews_waiting: int = 0
    waiting: int = 0  # requests that wait for the lock, or have it

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
        prompt_BTHWC = torch.from_numpy(session.frame_HWC.copy())[None, None]
        session.world = World(session.model.genie.start(prompt_BTHWC, seed=session.seed))
        first = Frame(session.id, 0, NO_ACTION, session.world.state.codes_BNC[0].cpu().numpy())
        self.store.create(self._record(session, png(session.frame_HWC)), [first])

    def step(self, sessions: list[Session], actions: list[int]) -> list[Pixels | None]:
        """One pass for sessions of one model that sample alike: each one's next frame, in the store before it is seen.

        None for a session that ended, or that another process stepped meanwhile. `steps` are not moved on.
        """
        awake = []
        for session, action in zip(sessions, actions, strict=True):
            with suppress(UnknownSessionError):
                awake.append((session, action, self.wake(session)))
        if not awake:
            return [None] * len(sessions)
        torch.set_num_threads(max(self._threads - (len(awake) <= _FEW), 1))
        genie, sampling = sessions[0].model.genie, sessions[0].sampling
        found = worlds.step(genie, [world for *_, world in awake], [action for _, action, _ in awake], sampling)
        frames = [
            Frame(session.id, session.steps + 1, action, codes_NC)
            for (session, action, _), (_, codes_NC) in zip(awake, found, strict=True)
        ]
        kept = self.store.append(frames)
        seen = {
            session: frame_HWC for (session, *_), (frame_HWC, _), mine in zip(awake, found, kept, strict=True) if mine
        }
        return [seen.get(session) for session in sessions]

    def remember(self, sessions: list[Session]) -> None:
        """What is left of a pass once its frames are out."""
        awake = [session.world for session in sessions if session.world is not None]
        worlds.remember(sessions[0].model.genie, awake)

    def wake(self, session: Session) -> World:
        """Brings a parked world back, from the tokens of the last frames that matter. Raises UnknownSessionError."""
        if session.world is None:
            genie = session.model.genie
            kept = self._kept(session, max(session.steps + 1 - genie.memory, 0), session.steps + 1)
            codes_1TNC = torch.from_numpy(np.stack([frame.codes_NC for frame in kept]).astype(np.int64))[None]
            actions_1T = torch.tensor([[frame.action for frame in kept]])
            session.world = World(genie.resume(codes_1TNC, actions_1T, [session.seed], [session.steps + 1]))
        return session.world

    def park(self, session: Session) -> None:
        """Its world leaves memory."""
        session.world = None

    def leave_batch(self, session: Session) -> None:
        """Its world alone stays in memory, not all that it last stepped beside."""
        if session.world is not None and len(session.world.state.seeds) > 1:
            session.world = World(session.world.state.take([session.world.row]))

    def copies(self, session: Session, times: int) -> PlayState:
        """Its world so many times side by side."""
        world = self.wake(session)
        return world.state.take([world.row] * times)

    def past_frames(self, session: Session, start: int, stop: int) -> Pixels:
        """Frames start..stop as they were seen (up to rounding); frame 0 is the prompt itself."""
        genie = session.model.genie
        kept = self._kept(session, max(start + 1 - genie.memory, 0), stop)
        frames_THWC = genie.pictures(torch.from_numpy(np.stack([f.codes_NC for f in kept]).astype(np.int64))[None])[0]
        frames = frames_THWC.numpy()[start - kept[0].t :]
        if start == 0:
            frames[0] = frame_from_png(self._prompt(session))
        return frames

    def branch(self, session: Session, t: int, new_id: str) -> Session:
        """A new session with this one's frames 0..t. Raises UnknownSessionError."""
        kept = self._kept(session, 0, t + 1)
        branch = Session(new_id, session.model, session.seed, session.sampling, session.frame_HWC, steps=t)
        branch.frame_HWC = self.past_frames(session, t, t + 1)[0]
        copies = [Frame(new_id, frame.t, frame.action, frame.codes_NC) for frame in kept]
        self.store.create(self._record(branch, self._prompt(session)), copies)
        return branch

    def found(self, session_id: str) -> tuple[SessionRecord, int]:
        """What a process left in the store, and how many frames there are of it. Raises UnknownSessionError."""
        found = self.store.reopen(session_id)
        if found is None:
            raise UnknownSessionError(ENDED)
        return found

    def reopen(self, record: SessionRecord, length: int, model: LoadedModel) -> Session:
        """The session that was found. Raises UnknownSessionError where it ended meanwhile."""
        sampling, steps = SamplingConfig.model_validate_json(record.sampling), length - 1
        session = Session(record.id, model, record.seed, sampling, frame_from_png(record.prompt), steps=steps)
        session.frame_HWC = self.past_frames(session, steps, steps + 1)[0]
        return session

    def actions(self, session: Session, start: int, stop: int) -> list[int]:
        """Those that led to frames start..stop."""
        return [frame.action for frame in self._kept(session, start, stop)]

    def _kept(self, session: Session, start: int, stop: int) -> list[Frame]:
        tokenizer = session.model.genie.tokenizer
        shape = (tokenizer.num_patches, tokenizer.config.codes_per_patch)
        found = self.store.frames(session.id, shape, start, stop)
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
