"""The JSON that goes over the wire."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, FailFast, Field, model_validator

_RUN = "b7a0c1f2d3e4495f8a6b7c8d9e0f1a2b"


class ModelInfo(BaseModel):
    """The model version that a session plays."""

    name: str = Field(examples=["genie"])
    version: str = Field(description="its number; of a model served from a folder, what it holds", examples=["3"])
    run_id: str = Field(
        description="the MLflow run that made it; empty for a model served from a folder", examples=[_RUN]
    )
    num_actions: int = Field(description="actions are 0 .. num_actions - 1", examples=[6])
    frame_height: int = Field(description="of a frame, in pixels", examples=[64])
    frame_width: int = Field(description="of a frame, in pixels", examples=[64])
    large_height: int | None = Field(
        None, description="of a frame asked for with large=true; null: there are none", examples=[256]
    )
    large_width: int | None = Field(None, description="of the same", examples=[256])


class StartFrame(BaseModel):
    """A built-in held-out frame to start from."""

    name: str = Field(examples=["00"])
    url: str = Field(description="where its PNG is", examples=["/v1/starts/00.png"])


class Starts(BaseModel):
    """What a session can start from."""

    start_frames: list[StartFrame]
    max_upload_bytes: int = Field(examples=[10_485_760])


class SessionInfo(BaseModel):
    """One player's world."""

    id: str = Field(description="a secret: whoever knows it plays", examples=["pJ3mW0vQk6sZ9y2d"])
    model: ModelInfo
    seed: int = Field(examples=[7])
    steps: int = Field(description="actions taken so far; frame 0 is the prompt", examples=[12])
    temperature: float = Field(description="of the tokens' distribution", examples=[0.5])
    maskgit_steps: int = Field(description="MaskGIT steps a frame", examples=[1])


class StepRequest(BaseModel):
    """The action to take, or several, checked against the session's own model."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"action": 2, "step": 1}, {"actions": [2, 2, 3]}]}
    )

    action: int | None = Field(None, description="0 .. num_actions - 1")
    actions: list[int] | None = Field(
        None, min_length=1, max_length=64, description="instead, to take one after another"
    )
    step: int | None = Field(
        None,
        ge=1,
        description="the number that the (first) step is to get: sent again after a lost answer, none is taken twice",
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

    model_config = ConfigDict(extra="forbid")

    colour: Colour = "#000000"
    width: Share = Field(0.05, description="as a share of the frame's width", examples=[0.05])
    points: Annotated[list[tuple[Share, Share]], FailFast()] = Field(
        min_length=1,
        max_length=2000,
        description="(x, y) as shares of the frame's width and height, from the top left",
        examples=[[[0.2, 0.5], [0.8, 0.5]]],
    )


class Sketch(BaseModel):
    """A drawn prompt: a canvas of colours, and strokes upon it."""

    model_config = ConfigDict(extra="forbid")

    canvas: list[Annotated[list[Colour], Field(min_length=1, max_length=64)]] = Field(
        [["#ffffff"]],
        min_length=1,
        max_length=64,
        description="rows of colours that fill the frame, from the top; one colour alone fills it all",
        examples=[[["#87ceeb"], ["#87ceeb"], ["#8b5a2b"]]],
    )
    strokes: Annotated[list[Stroke], FailFast()] = Field(
        [], max_length=500, description="of at most 5,000 points in all"
    )

    @model_validator(mode="after")
    def _not_too_long(self) -> Sketch:
        if sum(len(stroke.points) for stroke in self.strokes) > 5000:
            raise ValueError("a sketch may have 5,000 points in all")
        return self


class BranchRequest(BaseModel):
    """What if, at that frame, another action had been taken?"""

    model_config = ConfigDict(extra="forbid", strict=True)

    t: int = Field(ge=0, description="the last frame that both have in common; 0 is the prompt", examples=[12])


class Previews(BaseModel):
    """What each action would do from frame `steps` on, when taken `repeats` times."""

    steps: int = Field(examples=[12])
    repeats: int = Field(examples=[3])
    images: list[str] = Field(description="one PNG per action, as data URLs", examples=[["data:image/png;base64,..."]])


class InferredActions(BaseModel):
    """What happened between successive frames, in the model's own actions."""

    model: ModelInfo
    actions: list[int] = Field(description="one fewer than the frames", examples=[[0, 3, 3]])


class ModelVersionInfo(BaseModel):
    """A registered version."""

    version: str = Field(examples=["3"])
    run_id: str = Field(examples=[_RUN])
    aliases: list[str] = Field(examples=[["champion"]])
    metrics: dict[str, float] = Field(description="held-out, as registered", examples=[{"delta_psnr_t4": 5.8}])


class Ready(BaseModel):
    """A model is loaded and warm."""

    model: ModelInfo
    sessions: int = Field(description="open here", examples=[2])
    problem: str = Field(description="why the alias's newest version is not the one served; else empty", examples=[""])


class Problem(BaseModel):
    """The body of every 4xx and 5xx answer, application/problem+json (RFC 9457)."""

    type: str = Field(description="about:blank: the status says which kind of problem it is", examples=["about:blank"])
    title: str = Field(description="the status in words", examples=["Not Found"])
    status: int = Field(examples=[404])
    code: str = Field(description="for programs", examples=["unknown_session"])
    detail: str = Field(
        description="what was wrong and what is allowed, in one line",
        examples=["this session does not exist or has ended: create a new one"],
    )
