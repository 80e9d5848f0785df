"""The JSON that goes over the wire."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field, model_validator


class ModelInfo(BaseModel):
    """The model version that a session plays."""

    name: str
    version: str
    run_id: str = Field(description="the MLflow run that made it; empty for a model served from a folder")
    num_actions: int = Field(description="actions are 0 .. num_actions - 1")
    frame_height: int = Field(description="of a frame, in pixels")
    frame_width: int = Field(description="of a frame, in pixels")


class StartFrame(BaseModel):
    """A built-in held-out frame to start from."""

    name: str
    url: str = Field(description="where its PNG is")


class Starts(BaseModel):
    """What a session can start from."""

    start_frames: list[StartFrame]
    max_upload_bytes: int


class SessionInfo(BaseModel):
    """One player's world."""

    id: str
    model: ModelInfo
    seed: int
    steps: int = Field(description="actions taken so far; frame 0 is the prompt")
    temperature: float = Field(description="of the tokens' distribution")
    maskgit_steps: int = Field(description="MaskGIT steps a frame")


class StepRequest(BaseModel):
    """The action to take, or several, checked against the session's own model."""

    action: int | None = Field(None, description="0 .. num_actions - 1", examples=[2])
    actions: list[int] | None = Field(None, min_length=1, max_length=64, description="to take one after another")
    step: int | None = Field(
        None,
        ge=1,
        description="the number that the (first) step is to get: sent again after a lost answer, none is taken twice",
        examples=[1],
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> StepRequest:
        if (self.action is None) == (self.actions is None):
            raise ValueError("send either an action or a list of actions")
        return self

    @property
    def taken(self) -> list[int]:
        return self.actions or [self.action or 0]


Colour = Annotated[str, Field(pattern="^#[0-9a-fA-F]{6}$", description="as in #87ceeb", examples=["#87ceeb"])]
Share = Annotated[float, Field(ge=0, le=1)]


class Stroke(BaseModel):
    """A line through some points, or a dot at one, with round ends."""

    colour: Colour = "#000000"
    width: Share = Field(0.05, description="as a share of the frame's width")
    points: list[tuple[Share, Share]] = Field(
        min_length=1, max_length=2000, description="(x, y) as shares of the frame's width and height, from the top left"
    )


class Sketch(BaseModel):
    """A drawn prompt: a canvas of colours, and strokes upon it."""

    canvas: list[Annotated[list[Colour], Field(min_length=1, max_length=64)]] = Field(
        [["#ffffff"]],
        min_length=1,
        max_length=64,
        description="rows of colours that fill the frame, from the top; one colour alone fills it all",
        examples=[[["#87ceeb"], ["#87ceeb"], ["#8b5a2b"]]],
    )
    strokes: list[Stroke] = Field([], max_length=500)


class BranchRequest(BaseModel):
    """What if, at that frame, another action had been taken?"""

    t: int = Field(ge=0, description="the last frame that both have in common; 0 is the prompt", examples=[12])


class Previews(BaseModel):
    """What each action would do from frame `steps` on, when taken `repeats` times."""

    steps: int
    repeats: int
    images: list[str] = Field(description="one PNG per action, as data URLs")


class InferredActions(BaseModel):
    """What happened between successive frames, in the model's own actions."""

    model: ModelInfo
    actions: list[int] = Field(description="one fewer than the frames")


class ModelVersionInfo(BaseModel):
    """A registered version."""

    version: str
    run_id: str
    aliases: list[str]
    metrics: dict[str, float] = Field(description="held-out, as registered")


class Ready(BaseModel):
    """A model is loaded and warm."""

    model: ModelInfo
    sessions: int
    problem: str = Field(description="why the alias's newest version is not the one served; else empty")


class Problem(BaseModel):
    """The body of every 4xx and 5xx answer, application/problem+json (RFC 9457)."""

    type: str = Field(description="about:blank: the status says which kind of problem it is")
    title: str = Field(description="the status in words")
    status: int
    code: str = Field(description="for programs", examples=["unknown_session"])
    detail: str = Field(description="what was wrong and what is allowed, in one line")
