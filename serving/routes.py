"""The HTTP surface: it unpacks requests for the engine and packs its answers."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, File, Form, Path, Query, Request, Response, UploadFile
from fastapi.responses import PlainTextResponse
from pydantic import BeforeValidator, Json
from starlette.concurrency import run_in_threadpool

from genie_model.config import SamplingConfig
from serving import images
from serving.clients import Client, Clients
from serving.engine import Engine
from serving.errors import BadRequestError, ServiceError, UnknownStartFrameError, UploadTooLargeError
from serving.images import (
    Animation,
    Picture,
    Pixels,
    frame_from_data_url,
    frame_from_sketch,
    frame_from_upload,
    picture_of,
    png_data_url,
)
from serving.metrics import Metrics
from serving.model import LoadedModel
from serving.schemas import (
    BranchRequest,
    InferredActions,
    ModelInfo,
    ModelVersionInfo,
    Previews,
    Problem,
    Ready,
    SessionInfo,
    Sketch,
    StartFrame,
    Starts,
    StepRequest,
)
from serving.sessions import Session
from serving.settings import Settings


def get_engine(request: Request) -> Engine:
    engine: Engine = request.app.state.engine
    return engine


def get_settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def get_client(request: Request) -> Client:
    client: Client = request.state.client
    return client


def get_clients(request: Request) -> Clients:
    clients: Clients = request.app.state.clients
    return clients


EngineDep = Annotated[Engine, Depends(get_engine)]
ClientDep = Annotated[Client, Depends(get_client)]
ClientsDep = Annotated[Clients, Depends(get_clients)]
SettingsDep = Annotated[Settings, Depends(get_settings)]

_PROBLEM: dict[str, Any] = {
    "description": "what was wrong, and what is allowed",
    "content": {"application/problem+json": {"schema": Problem.model_json_schema()}},
    "headers": {
        "Retry-After": {"description": "with 429 and 503: seconds to wait", "schema": {"type": "integer"}, "example": 1}
    },
}
health = APIRouter(tags=["health"])
v1 = APIRouter(prefix="/v1", tags=["play"], responses={"default": _PROBLEM})

_SKETCH_LETTERS = 2**19  # which is far more than the most points and colours need
_MEDIA_TYPES: dict[Animation, str] = {"gif": "image/gif", "mp4": "video/mp4"}
_ANIMATION = {200: {"content": {kind: {} for kind in _MEDIA_TYPES.values()}, "description": "the animation"}}
_X_STEPS = {
    "X-Steps": {"description": "which frame of its session it is", "schema": {"type": "integer"}, "example": 12}
}
_TIMED = _X_STEPS | {
    "Server-Timing": {"description": "how long it took", "schema": {"type": "string"}, "example": "step;dur=21.4"}
}
_PNG = {200: {"content": {"image/png": {}}, "description": "the frame; X-Steps says which", "headers": _X_STEPS}}
_STEPPED = {200: {**_PNG[200], "headers": _TIMED}}

Large = Annotated[
    bool,
    Query(description="larger frames: the model's large_height and large_width say whether there are", examples=[True]),
]
SessionId = Annotated[str, Path(description="as POST /v1/sessions gave it", examples=["pJ3mW0vQk6sZ9y2d"])]


async def get_session(session_id: SessionId, engine: EngineDep, client: ClientDep) -> Session:
    return await engine.session_now(session_id, client)


SessionDep = Annotated[Session, Depends(get_session)]


_ALIVE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {"example": {"status": "alive"}}}, "description": "it lives"}
}


@health.get("/healthz", responses={**_ALIVE, 500: _PROBLEM})
async def healthz(request: Request) -> dict[str, str]:
    """The process lives, and can step worlds: where not, it has to be started anew."""
    if any(task.done() for task in request.app.state.tasks):
        raise ServiceError("what steps the worlds has ended: see the log")
    return {"status": "alive"}


@health.get("/readyz", responses={503: _PROBLEM})
async def readyz(engine: EngineDep) -> Ready:
    """A model is loaded and warm: players can be sent here."""
    return Ready(model=engine.model.info, sessions=engine.num_sessions, problem=engine.models.problem)


_SCRAPED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"example": "genie_sessions 3.0"}}, "description": "Prometheus's text"}
}


@health.get("/metrics", response_class=PlainTextResponse, responses=_SCRAPED)
async def metrics(request: Request, engine: EngineDep) -> PlainTextResponse:
    """What Prometheus scrapes."""
    found: Metrics = request.app.state.metrics
    found.sessions.set(engine.num_sessions)
    found.queue.set(engine.passes.num_waiting)
    return PlainTextResponse(found.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@v1.get("/model")
async def model(engine: EngineDep) -> ModelInfo:
    """The version that new sessions play."""
    return engine.model.info


@v1.get("/starts")
async def starts(engine: EngineDep, settings: SettingsDep) -> Starts:
    """What a session can start from."""
    frames = [StartFrame(name=name, url=f"/v1/starts/{name}.png") for name in engine.model.start_frames]
    return Starts(start_frames=frames, max_upload_bytes=settings.max_upload_bytes)


@v1.get("/starts/{name}.png", response_class=Response, responses=_PNG)  # type: ignore[arg-type]
async def start_frame_png(name: Annotated[str, Path(examples=["00"])], engine: EngineDep) -> Response:
    """A built-in start frame."""
    return Response(_start_frame(engine.model, name), media_type="image/png")


@dataclass(frozen=True)
class Prompt:
    """What a world is begun with."""

    model: LoadedModel
    frame_HWC: Pixels
    seed: int | None
    sampling: SamplingConfig


async def get_model(
    engine: EngineDep,
    client: ClientDep,
    clients: ClientsDep,
    version: Annotated[
        str | None,
        Form(
            pattern=r"^[\w.-]{1,64}$", description="its number or an alias; by default what is served", examples=["3"]
        ),
    ] = None,
) -> LoadedModel:
    clients.count_worlds(client)  # here, before an upload is decoded: all that asks for a model begins something
    return await engine.version(version)


ModelDep = Annotated[LoadedModel, Depends(get_model)]


def _only(*fields: str) -> Any:
    """A dependency that refuses fields that are none of the form's: a misspelt seed would be no seed."""

    async def look(request: Request) -> None:
        if strangers := ", ".join(sorted(set(await request.form()) - set(fields))):
            raise BadRequestError(f"the form has no field {strangers[:200]}; it has {', '.join(fields)}")

    return Depends(look)


_PROMPT = ("version", "image", "image_url", "start_frame", "sketch", "seed", "temperature", "maskgit_steps")


def _not_too_long(sketch: object) -> object:
    if isinstance(sketch, str) and len(sketch) > _SKETCH_LETTERS:
        raise ValueError(f"a sketch may have {_SKETCH_LETTERS:,} letters of JSON")
    return sketch


async def get_prompt(
    engine: EngineDep,
    settings: SettingsDep,
    client: ClientDep,
    model: ModelDep,
    image: Annotated[
        UploadFile | None, File(description="a picture of any size: its middle is taken, in the aspect of a frame")
    ] = None,
    image_url: Annotated[
        str | None, Form(description="the same as a data URL", examples=["data:image/png;base64,iVBORw0KGgo..."])
    ] = None,
    start_frame: Annotated[str | None, Form(description="the name of a built-in start frame", examples=["00"])] = None,
    sketch: Annotated[
        Annotated[Json[Sketch], BeforeValidator(_not_too_long)] | None,
        Form(
            description="a drawing or a canvas of colours, as JSON",
            examples=['{"canvas": [["#87ceeb"], ["#8b5a2b"]], "strokes": [{"points": [[0.2, 0.5], [0.8, 0.5]]}]}'],
        ),
    ] = None,
    seed: Annotated[
        int | None, Form(ge=0, lt=2**31, description="the same seed dreams the same world", examples=[7])
    ] = None,
    temperature: Annotated[
        float | None, Form(ge=0, le=10, allow_inf_nan=False, description="of the tokens' distribution", examples=[0.5])
    ] = None,
    maskgit_steps: Annotated[
        int | None, Form(ge=1, description="MaskGIT steps a frame, up to a limit", examples=[2])
    ] = None,
) -> Prompt:
    if sum(prompt is not None for prompt in (image, image_url, start_frame, sketch)) != 1:
        raise BadRequestError("send one of image, image_url, sketch, or the name of a start_frame")
    if maskgit_steps is not None and maskgit_steps > settings.max_maskgit_steps:
        raise BadRequestError(f"maskgit_steps must be from 1 to {settings.max_maskgit_steps}, not {maskgit_steps}")
    asked = {"temperature": temperature, "maskgit_steps": maskgit_steps}
    sampling = model.genie.config.sampling.model_copy(update={k: v for k, v in asked.items() if v is not None})
    size = model.info.frame_height, model.info.frame_width
    async with engine.decoding.turn(client):
        if sketch is not None:
            frame_HWC = await run_in_threadpool(frame_from_sketch, sketch, *size)
        elif image_url is not None:
            frame_HWC = await run_in_threadpool(frame_from_data_url, image_url, *size, settings.max_upload_pixels)
        else:
            upload = await _read(image, settings) if image else _start_frame(model, start_frame or "")
            frame_HWC = await run_in_threadpool(frame_from_upload, upload, *size, settings.max_upload_pixels)
    return Prompt(model, frame_HWC, seed, sampling)


PromptDep = Annotated[Prompt, Depends(get_prompt)]


@v1.post("/sessions", status_code=201, dependencies=[_only(*_PROMPT)])
async def create_session(engine: EngineDep, prompt: PromptDep, client: ClientDep) -> SessionInfo:
    """A new world, from a picture, a sketch or a built-in start frame."""
    session = await engine.create(prompt.model, prompt.frame_HWC, prompt.seed, prompt.sampling, client)
    return session.info()


@v1.post(
    "/rollouts",
    dependencies=[_only(*_PROMPT, "actions", "frames_per_second", "format", "large")],
    response_class=Response,
    responses=_ANIMATION,  # type: ignore[arg-type]
)
async def rollout(
    request: Request,
    engine: EngineDep,
    client: ClientDep,
    clients: ClientsDep,
    prompt: PromptDep,
    actions: Annotated[str, Form(description="to take one after another, from 0", examples=["0,0,0,3,3,1"])],
    frames_per_second: Annotated[int, Form(ge=1, le=50, examples=[10])] = 10,
    kind: Annotated[Animation, Form(alias="format", examples=["mp4"])] = "gif",
    large: Annotated[bool, Form(description="larger frames, where the model has them", examples=[True])] = False,
) -> Response:
    """The frames that a list of actions leads to, the prompt first, as an animation. No session is kept."""
    if not re.fullmatch(r"\d{1,4}(,\d{1,4}){0,499}", actions):
        raise BadRequestError("actions must be 1 to 500 whole numbers with commas between them, as in 0,0,3")
    taken = [int(action) for action in actions.split(",")]
    clients.count_steps(client, len(taken))
    frames_THWC = await engine.rollout(
        prompt.model, prompt.frame_HWC, prompt.seed, prompt.sampling, taken, client, request.is_disconnected, large
    )
    return await _animation(frames_THWC, kind, frames_per_second)


@v1.post("/actions/infer", dependencies=[_only("version", "frames")])
async def infer_actions(
    engine: EngineDep,
    settings: SettingsDep,
    client: ClientDep,
    model: ModelDep,
    frames: Annotated[list[UploadFile], File(description="two or more successive frames, in order")],
) -> InferredActions:
    """The latent actions that the model sees between the frames of a video."""
    most = model.genie.config.data.clip_length
    if not 2 <= len(frames) <= most:
        raise BadRequestError(f"send 2 to {most} frames, not {len(frames)}")
    clip, size = [], (model.info.frame_height, model.info.frame_width)
    for frame in frames:
        async with engine.decoding.turn(client):  # others' pictures in between
            upload = await _read(frame, settings)
            clip.append(await run_in_threadpool(frame_from_upload, upload, *size, settings.max_upload_pixels))
    return InferredActions(model=model.info, actions=await engine.infer(model, np.stack(clip)))


@v1.get("/models")
async def models(engine: EngineDep) -> list[ModelVersionInfo]:
    """Every registered version, the newest first, with its aliases and its held-out metrics."""
    return await engine.versions()


@v1.get("/sessions/{session_id}")
async def get_session_info(session: SessionDep) -> SessionInfo:
    """Where the session stands, and what it plays."""
    return session.info()


@v1.get("/sessions/{session_id}/frame", response_class=Response, responses=_PNG)  # type: ignore[arg-type]
async def frame(session: SessionDep, engine: EngineDep, large: Large = False) -> Response:
    """The newest frame as PNG."""
    return _frame_response(*await engine.newest(session, large))


@v1.post("/sessions/{session_id}/step", response_class=Response, responses=_STEPPED)  # type: ignore[arg-type]
async def step(
    body: StepRequest,
    session_id: SessionId,
    engine: EngineDep,
    client: ClientDep,
    clients: ClientsDep,
    large: Large = False,
) -> Response:
    """Takes one action, or several, and answers with the frame they lead to as PNG.

    The first step with larger frames brings what they need of the past into memory, and takes longer; the first without
    lets go of it.
    """
    clients.count_steps(client, len(body.taken))
    began = time.perf_counter()
    _, steps, picture = await engine.step(session_id, body.taken, client, body.step, large)
    milliseconds = (time.perf_counter() - began) * 1000
    return _frame_response(steps, picture, **{"Server-Timing": f"step;dur={milliseconds:.1f}"})


@v1.get("/sessions/{session_id}/previews")
async def previews(
    session: SessionDep,
    engine: EngineDep,
    client: ClientDep,
    clients: ClientsDep,
    repeats: Annotated[int, Query(ge=1, le=8, description="times each action is taken", examples=[3])] = 3,
) -> Previews:
    """What each latent action would do from here: the session itself stays where it is."""
    clients.count_steps(client, repeats * session.model.info.num_actions)
    steps, frames_AHWC = await engine.previews(session, repeats)
    return Previews(steps=steps, repeats=repeats, images=[png_data_url(frame_HWC) for frame_HWC in frames_AHWC])


@v1.get("/sessions/{session_id}/frames/{t}", response_class=Response, responses=_PNG)  # type: ignore[arg-type]
async def past_frame(
    session: SessionDep, engine: EngineDep, t: Annotated[int, Path(ge=0, examples=[0])], large: Large = False
) -> Response:
    """Any frame of the session's past as PNG; frame 0 is the prompt, or large what its tokens show."""
    return _frame_response(t, picture_of((await engine.frames(session, t, t + 1, large))[0]))


@v1.get("/sessions/{session_id}/animation.{kind}", response_class=Response, responses=_ANIMATION)  # type: ignore[arg-type]
async def animation(
    request: Request,
    session: SessionDep,
    engine: EngineDep,
    client: ClientDep,
    clients: ClientsDep,
    kind: Annotated[Animation, Path(examples=["gif"])],
    frames_per_second: Annotated[int, Query(ge=1, le=50, examples=[10])] = 10,
    last: Annotated[int, Query(ge=1, le=1000, description="at most so many frames, the newest", examples=[300])] = 300,
    large: Large = False,
) -> Response:
    """The session as an animation."""
    start, stop = max(session.steps + 1 - last, 0), session.steps + 1
    clients.count_steps(client, stop - start)
    async with engine.long_jobs.turn(client, request.is_disconnected):
        frames_THWC = await engine.frames(session, start, stop, large)
        return await _animation(frames_THWC, kind, frames_per_second)


@v1.post("/sessions/{session_id}/branch", status_code=201)
async def branch(
    body: BranchRequest, session: SessionDep, engine: EngineDep, client: ClientDep, clients: ClientsDep
) -> SessionInfo:
    """A new session that shares this one's frames up to t, and its seed: what if another action had been taken?"""
    clients.count_worlds(client)
    return (await engine.branch(session, body.t, client)).info()


@v1.delete("/sessions/{session_id}", status_code=204)
async def delete_session(session_id: SessionId, engine: EngineDep) -> None:
    """Ends a session."""
    await engine.delete(session_id)


async def _animation(frames_THWC: Pixels, kind: Animation, frames_per_second: int) -> Response:
    packed = await run_in_threadpool(images.animation, frames_THWC, kind, frames_per_second)
    return Response(packed, media_type=_MEDIA_TYPES[kind], headers={"Cache-Control": "no-store"})


async def _read(upload: UploadFile, settings: Settings) -> bytes:
    """Raises UploadTooLargeError; what carries a file may be larger, for it may be a data URL."""
    if (upload.size or 0) > settings.max_upload_bytes:
        raise UploadTooLargeError(f"the file is too large: at most {settings.max_upload_bytes / 1e6:.1f} MB")
    return await upload.read()


def _start_frame(model: LoadedModel, name: str) -> bytes:
    if name not in model.start_frames:
        known = ", ".join(model.start_frames) or "none: upload an image"
        raise UnknownStartFrameError(f"there is no start frame {name!r}; there are: {known}")
    return model.start_frames[name]


def _frame_response(steps: int, picture: Picture, **headers: str) -> Response:
    headers = {"X-Steps": str(steps), "Cache-Control": "no-store", **headers}
    return Response(picture.png, media_type="image/png", headers=headers)
