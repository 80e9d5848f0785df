"""The labelling page and what it asks: the next clip, its pictures, and to keep a label."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field
from starlette.middleware.trustedhost import TrustedHostMiddleware

from genie_model.data.labels import BAD, GOOD, as_json
from serving.label.clips import Clip, Clips

_OWN = Path(__file__).parent / "web"
_SHARED = Path(__file__).parents[1] / "web"  # the play page's style, and how it asks a service
_NOT_KEPT = {"Cache-Control": "no-cache"}


class Said(BaseModel):
    model_config = ConfigDict(extra="forbid")

    label: Annotated[int, Field(ge=BAD, le=GOOD)] | None = Field(description="null takes the label back")


class Shown(BaseModel):
    """A clip, or null where all are labelled, and how far the labels are."""

    clip: Clip | None
    progress: dict[str, Any]


def create_app(clips: Clips, hosts: Sequence[str] = ()) -> FastAPI:
    """`hosts`: the names by which browsers ask for it, beside those of this machine; 0.0.0.0 for any."""
    app = FastAPI(title="Label clips")
    if "0.0.0.0" not in hosts:  # another site's page cannot read it under a name of its own
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", *hosts])

    @app.get("/clips/next")
    def next_clip(after: int = -1) -> Shown:
        return Shown(clip=clips.following(after), progress=clips.progress())

    @app.get("/clips/{position}")
    def clip(position: int) -> Shown:
        return Shown(clip=_known(clips, position), progress=clips.progress())

    @app.get("/clips/{position}/sheet.jpg")
    def sheet(position: int, digest: str) -> Response:
        if _known(clips, position).digest != digest:  # the page is of another data set
            raise HTTPException(404, "this is another clip now: load the page again")
        return Response(clips.sheet(position), media_type="image/jpeg", headers={"Cache-Control": "max-age=86400"})

    @app.put("/clips/{position}/label")
    def label(position: int, said: Said) -> Shown:
        _known(clips, position)
        try:
            return Shown(clip=clips.say(position, said.label), progress=clips.progress())
        except OSError as error:
            raise HTTPException(507, f"not kept: {error}") from None

    @app.get("/labels.json")
    def labels() -> Response:
        return Response(as_json(clips.labels.values()), media_type="application/json", headers=_NOT_KEPT)

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(_OWN / "index.html", headers=_NOT_KEPT)

    app.mount("/label", StaticFiles(directory=_OWN), name="label")
    app.mount("/web", StaticFiles(directory=_SHARED), name="web")
    return app


def _known(clips: Clips, position: int) -> Clip:
    try:
        return clips.clip(position)
    except IndexError as error:
        raise HTTPException(404, str(error)) from None
