"""What an operator may set: every field is an environment variable GENIE_<NAME> and a flag --<name>."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from genie_model.files import cache_dir

Origin = Annotated[str, Field(pattern=r"^(\*|https?://[^/\s]+)$")]  # as browsers send it: no path, no slash at its end


class Settings(BaseSettings):
    """Flags win over environment variables, those over the defaults here."""

    model_config = SettingsConfigDict(
        env_prefix="GENIE_",
        cli_prog_name="python -m serving",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        protected_namespaces=(),
    )

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    model_uri: str | None = Field(None, description="serve this model folder instead of the registry's champion")
    tracking_uri: str | None = Field(None, description="the MLflow server; else MLFLOW_TRACKING_URI is used")
    model_name: str = Field("genie", description="the registered model")
    alias: str = Field("champion", description="the alias that says which version is served")
    wait: bool = Field(False, description="start without a model and wait for one (/readyz says 503 until then)")
    poll_seconds: float = Field(10.0, gt=0, description="how often the alias is looked up")
    log_format: Literal["text", "json"] = Field("text", description="json: a line of JSON for every request and event")
    session_store: str = Field(
        default_factory=lambda: str(cache_dir() / "sessions.db"),
        repr=False,  # a password may be in it
        description="what keeps sessions beyond the process: a file (default: in the user's cache), or for several"
        " replicas the redis://, rediss:// or unix:// URL of a Redis; :memory: keeps none",
    )
    threads: int = Field(
        os.cpu_count() or 2, ge=1, description="of the model; with one or two players it leaves one core to requests"
    )
    max_batch: int = Field(8, ge=1, description="sessions that step in one pass of the model")
    max_waiting: int = Field(8, ge=1, description="requests of one session that may wait for their turn")
    max_maskgit_steps: int = Field(25, ge=1, description="most MaskGIT steps a frame that a session may ask for")
    max_models: int = Field(3, ge=1, description="versions in memory at once; a new champion comes beside them")
    max_sessions: int = Field(16, ge=1, description="sessions open at once")
    idle_seconds: float = Field(900.0, gt=0, description="a session that nobody steps for this long ends")
    max_rollouts: int = Field(4, ge=1, description="rollouts and animations that are made or wait")
    max_rollout_seconds: float = Field(120.0, gt=0, description="a rollout or animation not made by then is refused")
    max_animation_pixels: int = Field(70_000_000, ge=1, description="of all frames of a rollout or animation")
    max_step_seconds: float = Field(30.0, gt=0, description="a step that has waited so long is refused with 503")
    max_connections: int = Field(1000, ge=1, description="connections open at once; to more the answer is 503")
    client_connections: int = Field(
        200, ge=0, description="of them from one address, unless there are trusted proxies; 0: any number"
    )
    max_sockets: int = Field(4, ge=1, description="WebSockets open to one session")
    max_upload_seconds: float = Field(30.0, gt=0, description="a request's body has to be there by then")
    api_keys: str | None = Field(
        None,
        description="a TOML file of who may play: a table [name] each with sha256 = the key's "
        "(printf %s KEY | sha256sum), and, if they differ, sessions and steps_per_minute",
    )
    client_sessions: int = Field(8, ge=0, description="sessions that one client may have open; 0: any number")
    client_steps_per_minute: int = Field(6000, ge=0, description="steps that one client may take; 0: any number")
    client_rollouts: int = Field(
        2, ge=0, description="rollouts and animations of one client that are made or wait; 0: any number"
    )
    client_worlds_per_minute: int = Field(
        60, ge=0, description="sessions, rollouts and inferences that one client may begin; 0: any number"
    )
    trusted_proxies: str = Field(
        "", description="whose X-Forwarded-For says which client it is: addresses or networks, or * (default: nobody's)"
    )
    cors_origins: Annotated[list[Origin], NoDecode] = Field(
        [], description="other sites whose pages may play, as in https://example.com,https://other.example; or *"
    )
    traces: bool = Field(False, description="send OpenTelemetry traces to OTEL_EXPORTER_OTLP_ENDPOINT (extra: otel)")
    max_upload_bytes: int = Field(10 * 2**20, ge=1024, description="largest upload")
    max_upload_pixels: int = Field(40_000_000, ge=1, description="largest picture, in pixels")

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _between_commas(cls, value: object) -> object:
        return [origin.strip() for origin in value.split(",") if origin.strip()] if isinstance(value, str) else value
