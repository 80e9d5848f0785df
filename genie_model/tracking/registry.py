"""The model registry: versions of "genie"; the alias `champion` says which one is served."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

from genie_model import files, large_decoder
from genie_model.checkpoint import load_training
from genie_model.config import Config
from genie_model.evaluate import measured_on
from genie_model.progress import summary
from genie_model.tracking.runs import StepRun, connect

_CODE = Path(__file__).with_name("pyfunc_model.py")
_FOLDER = "genie"  # the model folder's name inside a version's artifacts
MEASURED_ON = "measured_on"  # the tag of a version that says what its metrics stand for
_REQUIREMENTS = ("torch", "numpy", "einops", "safetensors", "fsspec", "pydantic")
_DESCRIPTION = (
    "A world learned from video alone, played with latent actions. The version with the alias **champion** is the one "
    "that is served: the promote step moves the alias, and moving it by hand on this page does the same. **previous** "
    "is the champion before; `python -m pipelines rollback` puts it back."
)


@dataclass(frozen=True)
class ModelVersion:
    """A version on local disk; `folder` holds config.json, model.safetensors, start_frames/, maybe large_decoder/."""

    name: str
    version: str
    run_id: str
    folder: str


class UnknownVersionError(ValueError, LookupError):
    """There is no such version; where MLflow cannot be asked, or a version not be had, a plain ValueError says so."""


def register(
    model_uri: str,
    metrics: Mapping[str, float],
    data_uri: str,
    run: StepRun,
    name: str = "genie",
    large_decoder_uri: str = "",
) -> str:
    """Makes the folder at `model_uri` a version of the registered model `name`; returns the version's number.

    The version belongs to the pipeline's run, samples as its config says, and carries the `metrics` that were measured
    on `data_uri`/eval, which promotion compares; without a `data_uri` promotion measures it first. The larger decoder
    at `large_decoder_uri` becomes a folder of its own in the version, and its figures the version's. A model that is
    registered already keeps its version. Raises ValueError when a folder is missing, and for a larger decoder of
    another tokenizer.
    """
    client, tags = run.client, {MEASURED_ON: measured_on(run.config, data_uri)} if data_uri else {}
    mlflow.set_tracking_uri(client.tracking_uri)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, _FOLDER)
        _fetch(model_uri, folder)
        _set_sampling(folder, run.config)
        if large_decoder_uri:
            _fetch(large_decoder_uri, folder / large_decoder.FOLDER)
            large_decoder.check_fits(folder)
            figures = load_training(large_decoder_uri)
            metrics = {**metrics, **{key: value for key, value in figures.items() if key.startswith("large_")}}
        digest = _digest(folder)
        if known := _version_with(client, name, digest):
            mlflow.log_metrics(dict(metrics), run_id=run.parent_id, model_id=logged_model(known))
            for tag, value in tags.items():
                client.set_model_version_tag(name, known.version, tag, value)
            summary("register", f"{name} version {known.version} is this model already")
            return str(known.version)
        with mlflow.start_run(run_id=run.parent_id), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="mlflow.*")  # asks for an input example; the signature says it all
            logged = mlflow.pyfunc.log_model(
                name=name,
                python_model=str(_CODE),
                artifacts={"genie": str(folder)},
                signature=_signature(run.config),
                pip_requirements=[_pinned(library) for library in _REQUIREMENTS],
            )
            mlflow.log_metrics(dict(metrics), model_id=logged.model_id)
            _ensure_registered(client, name)
            tags |= {"model_digest": digest, "preset": run.config.name, "trained_at": model_uri}
            with contextlib.redirect_stderr(io.StringIO()):  # it tells what the summary below tells
                version = mlflow.register_model(logged.model_uri, name, tags=tags)
        client.update_run(run.parent_id, "RUNNING")  # start_run() ended it; the pipeline goes on
    summary("register", f"{name} version {version.version}")
    return str(version.version)


def champion(
    model_name: str = "genie", alias: str = "champion", tracking_uri: str = "", cache_dir: str | None = None
) -> ModelVersion:
    """The version that `alias` names, downloaded once per version into `cache_dir`.

    The cache is GENIE_CACHE_DIR/models unless given, by default ~/.cache/genie/models.

    Raises ValueError, one line that says what to do, when the server is missing, UnknownVersionError when the model or
    the alias is.
    """
    try:
        client = connect(tracking_uri)
        version = aliased(client, model_name, alias)
    except MlflowException as error:
        raise ValueError(f"MLflow cannot be asked for the model: {' '.join(str(error).split())[:300]}") from None
    if version is None:
        raise UnknownVersionError(
            f"no version of model {model_name!r} has the alias {alias!r}: run the pipeline {maker(model_name)}, "
            f"or set the alias in MLflow's Models page at {client.tracking_uri}"
        )
    return _local(client, model_name, version, cache_dir)


def maker(model_name: str) -> str:
    """The pipeline that registers versions of that name."""
    return "coinrun (`make demo`)" if model_name == "genie" else f"video with --model-name {model_name}"


def numbered(
    version: str, model_name: str = "genie", tracking_uri: str = "", cache_dir: str | None = None
) -> ModelVersion:
    """The version of that number, as `champion` brings it. Raises as that does."""
    try:
        client = connect(tracking_uri)
        return _local(client, model_name, client.get_model_version(model_name, version), cache_dir)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise UnknownVersionError(f"there is no version {version} of model {model_name!r}") from None
        raise ValueError(f"MLflow has no version {version} for us: {' '.join(str(error).split())[:300]}") from None


def versions(model_name: str = "genie", tracking_uri: str = "") -> list[dict[str, Any]]:
    """Every version, the newest first: `version`, `run_id`, `aliases` and held-out `metrics`.

    Raises ValueError when the server does not answer.
    """
    try:
        client = connect(tracking_uri)
        registered = client.search_registered_models(f"name = '{model_name}'")
        named: dict[str, list[str]] = {}
        for alias, version in (registered[0].aliases if registered else {}).items():
            named.setdefault(str(version), []).append(alias)
        found = client.search_model_versions(f"name = '{model_name}'", max_results=10_000)
        return [
            {
                "version": str(version.version),
                "run_id": str(version.run_id),
                "aliases": sorted(named.get(str(version.version), [])),
                "metrics": registered_metrics(client, version),
            }
            for version in sorted(found, key=lambda version: -int(version.version))
        ]
    except MlflowException as error:
        raise ValueError(f"MLflow cannot be asked for versions: {' '.join(str(error).split())[:300]}") from None


def _local(client: MlflowClient, name: str, version: Any, cache_dir: str | None) -> ModelVersion:
    folder = download(client, name, version, cache_dir)
    return ModelVersion(name, str(version.version), str(version.run_id), str(folder))


def download(client: MlflowClient, name: str, version: Any, cache_dir: str | None = None) -> Path:
    """The folder of a version's files, downloaded unless it is in the cache. Raises ValueError."""
    cache = Path(cache_dir).expanduser() if cache_dir else files.cache_dir() / "models"
    unique = hashlib.sha256(f"{version.source} {version.run_id}".encode()).hexdigest()[:12]
    folder = cache / f"{name}-{version.version}-{unique}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(client.tracking_uri)  # models:/ is looked up there, whatever download_artifacts is told
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            uri = f"models:/{name}/{version.version}"
            try:
                download_artifacts(artifact_uri=uri, dst_path=scratch)
            except MlflowException as error:
                raise ValueError(f"{uri} cannot be downloaded: {' '.join(str(error).split())}") from None
            made = Path(scratch, "artifacts", _FOLDER)
            if not made.is_dir():
                raise ValueError(f"{uri} holds no Genie: it was not registered by the pipeline")
            # Another process may have been faster; a whole folder is as good as this one.
            try:
                made.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
    return folder


def _ensure_registered(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name, description=_DESCRIPTION)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def aliased(client: MlflowClient, name: str, alias: str) -> Any | None:
    """The model version that has the alias, or None when model or alias do not exist."""
    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _version_with(client: MlflowClient, name: str, digest: str) -> Any | None:
    found = client.search_model_versions(f"name = '{name}' and tags.model_digest = '{digest}'", max_results=1)
    return client.get_model_version(name, found[0].version) if found else None


def registered_metrics(client: MlflowClient, version: Any) -> dict[str, float]:
    """The held-out metrics that a version was registered with; the latest value of each."""
    if not version.source.startswith("models:/"):
        return {}  # registered by hand from plain files: nothing was measured
    measured = client.get_logged_model(logged_model(version)).metrics or []
    return {metric.key: metric.value for metric in sorted(measured, key=lambda metric: metric.timestamp)}


def logged_model(version: Any) -> str:
    """The id of the model that a version is.

    MLflow's SQL store leaves `version.model_id` empty; the source, models:/<model id>, always says it.
    """
    return str(version.source.removeprefix("models:/"))


def _fetch(model_uri: str, folder: Path) -> None:
    files, path = fsspec.core.url_to_fs(model_uri)
    for needed in ("config.json", "model.safetensors"):
        if not files.exists(f"{path}/{needed}"):
            raise ValueError(f"{model_uri} is no model folder ({needed} is missing): train it again")
    files.get(f"{path.rstrip('/')}/", str(folder), recursive=True)
    for left in folder.rglob("*.tmp"):  # by a killed writer
        left.unlink()


def _set_sampling(folder: Path, config: Config) -> None:
    """A reused model may have been trained beside another sampling, which its weights do not depend on."""
    path = folder / "config.json"
    trained = Config.from_json(path.read_text())
    path.write_text(trained.model_copy(update={"sampling": config.sampling}).to_json())


def _digest(folder: Path) -> str:
    """Of all files below `folder`, their names included."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(folder)).encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def _signature(config: Config) -> ModelSignature:
    shape = config.frame_shape
    frames = TensorSpec(np.dtype("uint8"), (-1, *shape), "frames")
    actions = TensorSpec(np.dtype("int64"), (-1,), "actions")
    dreamt = TensorSpec(np.dtype("uint8"), (-1, *shape))
    return ModelSignature(Schema([frames, actions]), Schema([dreamt]), ParamSchema([ParamSpec("seed", "long", 0)]))


def _pinned(library: str) -> str:
    return f"{library}=={importlib.metadata.version(library).partition('+')[0]}"
