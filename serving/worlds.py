"""Worlds that step together: one pass of the model for all players who wait for their next frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakSet

import torch

from genie_model.config import SamplingConfig
from genie_model.genie import Genie, PlayState
from genie_model.large_decoder import LargeDecoder
from serving.images import Pixels
from serving.store import Codes


@dataclass(eq=False)
class World:
    """A session's row in the state that it shares with the sessions it last stepped beside."""

    state: PlayState
    row: int = 0
    sharing: WeakSet[World] = field(default_factory=WeakSet)  # all that are still in the state

    def __post_init__(self) -> None:
        self.sharing.add(self)


def step(
    genie: Genie,
    worlds: Sequence[World],
    actions: Sequence[int],
    sampling: SamplingConfig,
    decoder: LargeDecoder | None = None,
) -> list[tuple[Pixels, Pixels | None, Codes]]:
    """Takes each world's action; returns each's frame (H, W, 3), the same by the larger decoder, and its codes (N, C).

    The larger frame is there where that decoder follows all of the worlds (`PlayState.large`).

    Worlds that stepped together last time do so in place; others are first brought side by side, which copies their
    pasts once; of a state that they leave, what is still played is copied too once it is the smaller part. What a
    world becomes does not hang on what steps beside it.
    """
    state = worlds[0].state
    if any(world.state is not state for world in worlds) or len(worlds) != len(state.seeds):
        left = {id(world.sharing): world.sharing for world in worlds}.values()
        remember(genie, worlds)
        state, sharing = PlayState.stack([world.state.take([world.row]) for world in worlds]), WeakSet[World]()
        for row, world in enumerate(worlds):
            world.sharing.discard(world)
            world.state, world.row, world.sharing = state, row, sharing
            sharing.add(world)
        for behind in left:
            _shrink(list(behind))
    action_of = dict(zip((world.row for world in worlds), actions, strict=True))
    frames_BHWC = genie.step(state, torch.tensor([action_of[row] for row in range(len(worlds))]), sampling).numpy()
    codes_BNC = state.codes_BNC.cpu().numpy().astype("<u2")
    large_BHWC = decoder.show(state.codes_BNC, state.large).numpy() if decoder and state.large else None
    return [
        (frames_BHWC[world.row], None if large_BHWC is None else large_BHWC[world.row], codes_BNC[world.row])
        for world in worlds
    ]


def remember(genie: Genie, worlds: Sequence[World]) -> None:
    """Makes their newest frames past, which is what the next step would begin with."""
    for state in {id(world.state): world.state for world in worlds}.values():
        genie.remember(state)


def _shrink(behind: list[World]) -> None:
    """Lets go of a state's rows that nobody plays any more, once they are the larger part."""
    if behind and 2 * len(behind) < len(behind[0].state.seeds):
        state = behind[0].state.take([world.row for world in behind])
        for row, world in enumerate(behind):
            world.state, world.row = state, row
