"""The versions in memory: the champion, those that sessions play, and the last few that somebody asked for."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch

from serving.errors import BrokenVersionError, NotReadyError, TooManyVersionsError, UnknownVersionError
from serving.metrics import Metrics
from serving.model import FolderVersion, LoadedModel, ModelSource, ModelVersion, folder_digest, identity, load, warm
from serving.schemas import ModelVersionInfo
from serving.settings import Settings

log = logging.getLogger(__name__)


class BrokenModelError(ValueError):
    """A version holds no model that dreams."""


class _Broken(NamedTuple):
    reason: str
    tries: int
    again_at: float  # on the monotonic clock: not before that it is loaded again


class Models:
    """Follows the alias, and brings other versions into memory, each once, whoever asks.

    `work` does what it is given in the thread where frames are dreamt. Methods block while they ask the source or load:
    call them from threads other than the event loop's.
    """

    def __init__(
        self, settings: Settings, source: ModelSource, metrics: Metrics, work: Callable[[Callable[[], None]], None]
    ) -> None:
        self.champion: LoadedModel | None = None
        self.problem = "the model is loading"  # why the alias's version is not the one that is served; or empty
        self._settings, self._source, self._metrics, self._work = settings, source, metrics, work
        self._in_memory = WeakValueDictionary[tuple[str, str, str], LoadedModel]()
        self._recent: list[LoadedModel] = []  # kept though nobody plays them now, the last one asked for at the end
        self._identities: dict[str, tuple[str, str, str]] = {}  # of the source's versions, by number
        self._loading = threading.RLock()
        self._stopped = threading.Event()
        self._broken: dict[tuple[str, ...], _Broken] = {}  # by identity and folder
        self._listed: tuple[float, list[ModelVersionInfo]] | None = None

    # ---- the alias

    def refresh(self) -> None:
        """Loads and warms the alias's version beside the one that is served, then swaps, if it is another.

        Raises ValueError, saying what to do, when there is none or it does not load; the one that is served stays.
        """
        version = self._source.champion()
        if self.champion and self.champion.is_of(version):
            return
        model, before = self._bring(version), self.champion
        self._identities[version.version] = model.identity
        if before:
            self._metrics.serving.remove(before.info.name, before.info.version)
        self.champion = model
        self._metrics.serving.labels(model.info.name, model.info.version).set(1)
        self._metrics.reloads.labels("loaded").inc()
        log.info("serving %s version %s", version.name, version.version)

    def follow(self) -> None:
        """Starts to look for a new champion every `poll_seconds`, in a thread that dies with the process."""
        threading.Thread(target=self._follow, name="follow-champion", daemon=True).start()

    def close(self) -> None:
        self._stopped.set()

    def _follow(self) -> None:
        while not self._stopped.is_set():
            try:
                self.refresh()
                self.problem = ""
            except Exception as error:  # whatever is wrong with the registry or a new version, players play on
                if str(error) != self.problem and not self._stopped.is_set():
                    self.problem = str(error)
                    self._metrics.reloads.labels("refused").inc()
                    log.warning("no new model: %s", error)
            self._metrics.refused.set(bool(self.problem))
            self._stopped.wait(self._settings.poll_seconds)

    # ---- other versions

    def asked(self, version: str) -> LoadedModel:
        """The version of that number or alias.

        Raises UnknownVersionError, TooManyVersionsError, BrokenVersionError, and NotReadyError where it cannot be asked
        for. Why is in the log: reasons name folders and addresses.
        """
        known = self._in_memory.get(self._identities.get(version, ("", "", "")))
        if known:  # a number means the same for ever: nobody needs to be asked
            return known
        try:
            found = self._source.version(version)
            self._identities[found.version] = identity(found)
            return self._limited(found)
        except LookupError as error:
            raise UnknownVersionError(f"{error}; GET /v1/models lists them") from None
        except BrokenModelError as error:
            log.warning("version %s was asked for: %s", version, error)
            raise BrokenVersionError(f"version {version} does not work: choose another") from None
        except ValueError as error:
            log.warning("version %s was asked for: %s", version, error)
            raise NotReadyError(f"version {version} is not to be had at the moment: try again later") from None

    def in_memory(self, version: ModelVersion) -> LoadedModel | None:
        return self._in_memory.get(identity(version))

    def of_session(self, version: FolderVersion) -> LoadedModel:
        """What a session of the store plays: from the folder it was loaded from, or, on another machine, the source's.

        Raises NotReadyError and TooManyVersionsError.
        """
        try:
            if not version.run_id and folder_digest(version.folder) != version.version:
                raise ValueError(f"the model in {version.folder} is another by now")
            return self._limited(version)
        except ValueError:
            try:
                found = self._source.version(version.version)
                if identity(found) != identity(version):
                    raise ValueError(f"{version.name} {version.version} is not served here")
                return self._limited(found)
            except (ValueError, LookupError) as error:
                log.warning("a session's model is not to be had: %s", error)
                raise NotReadyError("this session's model is not to be had at the moment: try again later") from None

    def listed(self) -> list[ModelVersionInfo]:
        """All that the source knows of, asked at most every `poll_seconds`. Raises NotReadyError."""
        if not self._listed or time.monotonic() - self._listed[0] > self._settings.poll_seconds:
            try:
                self._listed = time.monotonic(), self._source.versions()
            except ValueError as error:
                raise NotReadyError(str(error)) from None
        return self._listed[1]

    def _limited(self, version: ModelVersion) -> LoadedModel:
        """Brought into memory beside at most `max_models - 1` others, of which the longest unasked leaves."""
        most = self._settings.max_models
        with self._loading:
            if identity(version) not in self._in_memory:
                while len(self._in_memory) >= most and self._recent:
                    self._recent.pop(0)
                if len(self._in_memory) >= most:
                    raise TooManyVersionsError(f"{most} versions are in play, which is all that fit: try again later")
            model = self._bring(version)
            self._recent = [*(one for one in self._recent if one is not model), model][-most:]
            return model

    def _bring(self, version: ModelVersion) -> LoadedModel:
        """Loads and warms it, unless it is in memory. Raises BrokenModelError; what is broken is rarely tried again."""
        with self._loading:
            model = self._in_memory.get(identity(version))
            here = (*identity(version), version.folder)
            broken = self._broken.get(here, _Broken("", 0, 0.0))
            if model is None and time.monotonic() < broken.again_at:
                raise BrokenModelError(broken.reason)
            if model is None:
                began = time.perf_counter()
                # Each thread that computes has helpers of its own; beside more helpers than cores, those of the thread
                # where worlds step would sleep after every operation instead of waiting for the next: half its speed.
                torch.set_num_threads(1)
                try:
                    model = load(version)
                    self._work(partial(warm, model))
                except Exception as error:  # whatever a file from elsewhere makes of a model
                    why = str(error) if isinstance(error, ValueError) else repr(error)
                    reason = f"version {version.version} does not work: {why}"
                    wait = self._settings.poll_seconds * 2 ** min(broken.tries, 6)
                    self._broken[here] = _Broken(reason, broken.tries + 1, time.monotonic() + wait)
                    raise BrokenModelError(reason) from error
                self._broken.pop(here, None)
                self._in_memory[model.identity] = model
                log.info("loaded %s version %s in %.1f s", version.name, version.version, time.perf_counter() - began)
            return model
