"""Who asks, and how much of the service is theirs: API keys, and limits for every client."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import math
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.errors import (
    BadRequestError,
    ForeignPageError,
    ServiceError,
    TooManyConnectionsError,
    TooManyRequestsError,
    UnauthorizedError,
    answer,
)
from serving.settings import Settings

_OPEN = frozenset(("/healthz", "/readyz", "/metrics"))  # to probes and Prometheus, which have no keys
_NO_KEY = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True)
class Client:
    """Somebody with a key, or an address; and what they may do. 0: as much as they like."""

    name: str
    sessions: int
    steps_per_minute: int


class Key(BaseModel):
    """A table of the file of keys, `[name]`; what it does not say is as for everybody."""

    model_config = ConfigDict(extra="forbid")

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    sessions: int | None = Field(None, ge=0)
    steps_per_minute: int | None = Field(None, ge=0)

    @field_validator("sha256")
    @classmethod
    def _of_a_key(cls, value: str) -> str:
        if value == _NO_KEY:  # a shell's variable was not set: everybody would be let in
            raise ValueError("this is the hash of an empty key")
        return value


def read_keys(path: str) -> dict[str, Key]:
    """By name. Raises ValueError, one line, when the file cannot be used."""
    try:
        keys = TypeAdapter(dict[str, Key]).validate_python(tomllib.loads(Path(path).read_text("utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"the API keys in {path} cannot be read: {error}") from None
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False))
        raise ValueError(f"the API keys in {path} are not tables [name] with sha256 = ...: {wrong}") from None
    if not keys:
        raise ValueError(f"there are no API keys in {path}: nobody could play")
    return keys


class Clients:
    """Tells clients apart, and counts what they do."""

    def __init__(self, settings: Settings) -> None:
        """Raises ValueError when the file of keys cannot be used."""
        self._settings = settings
        self._keys = read_keys(settings.api_keys) if settings.api_keys else None
        self._limiter = FixedWindowRateLimiter(MemoryStorage())

    def of(self, authorization: str, address: str) -> Client:
        """Raises UnauthorizedError where keys are asked for and this is none."""
        sessions, steps = self._settings.client_sessions, self._settings.client_steps_per_minute
        if self._keys is None:
            return Client(_network(address), sessions, steps)
        given = hashlib.sha256(_secret(authorization)).hexdigest()
        for name, key in self._keys.items():
            if hmac.compare_digest(given, key.sha256):
                return Client(
                    name,
                    sessions if key.sessions is None else key.sessions,
                    steps if key.steps_per_minute is None else key.steps_per_minute,
                )
        raise UnauthorizedError("this service asks for an API key: send it as Authorization: Bearer KEY")

    def count_steps(self, client: Client, steps: int) -> None:
        """Raises TooManyRequestsError, which says when there is room again; BadRequestError where there never is."""
        self._count(client, "steps", client.steps_per_minute, steps)

    def count_worlds(self, client: Client) -> None:
        """Of sessions, rollouts and clips to look at. Raises as `count_steps`."""
        self._count(client, "worlds", self._settings.client_worlds_per_minute, 1)

    def _count(self, client: Client, what: str, most: int, times: int) -> None:
        if 0 < most < times:
            raise BadRequestError(f"at most {most} {what} a minute, and this asks for {times}: ask for fewer")
        limit = RateLimitItemPerMinute(most)
        asked = limit, client.name, what
        if not most or (self._limiter.test(*asked, cost=times) and self._limiter.hit(*asked, cost=times)):
            return  # what is refused does not count: hence the test first
        seconds = max(math.ceil(self._limiter.get_window_stats(*asked).reset_time - time.time()), 1)
        raise TooManyRequestsError(f"at most {most} {what} a minute: try again in {seconds} s", seconds)


class Door:
    """Lets in whom `Clients` knows, before anything else of a request is looked at; puts `client` into its state."""

    def __init__(self, app: ASGIApp, clients: Clients, origins: list[str]) -> None:
        self.app, self.clients, self.origins = app, clients, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in _OPEN:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            if refused := scope.get("state", {}).get("refused"):
                raise TooManyConnectionsError(refused)
            if scope["type"] == "websocket" and not self._of_this_page(headers):
                raise ForeignPageError("this page is not the service's: name its site in --cors-origins")
            address = scope["client"][0] if scope.get("client") else ""
            scope.setdefault("state", {})["client"] = self.clients.of(headers.get("authorization", ""), address)
        except ServiceError as error:
            await answer(error)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _of_this_page(self, headers: Mapping[str, str]) -> bool:
        """Browsers send a key along with a WebSocket that any page opens, but they say which page it was."""
        origin = headers.get("origin")
        return (
            not origin
            or not {origin, "*"}.isdisjoint(self.origins)
            or origin.partition("://")[2] == headers.get("host")
        )


def _secret(authorization: str) -> bytes:
    """The key in a header: a Bearer's, or Basic's password, which a browser asks its user for by itself."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("latin-1")  # as headers are read: these are the bytes that were sent
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except ValueError:
            return b""
    return b""


def _network(address: str) -> str:
    """An address, of IPv6 the /64 that a household or a machine has to itself."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address  # a Unix socket's, or a test's
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    mapped = parsed.ipv4_mapped  # as an IPv4 client is named where one socket listens for both
    return str(mapped or ipaddress.ip_network((parsed, 64), strict=False))
