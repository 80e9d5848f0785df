"""Which version is the champion: the rule that promotes one, the way back, and whether it is as good as it was."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from genie_model.checkpoint import load_model
from genie_model.config import Config
from genie_model.data.held_out import HeldOut
from genie_model.evaluate import Evaluation, measure, measured_on
from genie_model.progress import summary
from genie_model.tracking.registry import (
    MEASURED_ON,
    UnknownVersionError,
    aliased,
    download,
    logged_model,
    maker,
    registered_metrics,
)
from genie_model.tracking.runs import StepRun

PREVIOUS = "previous"  # the alias of the champion before this one
# Tags of a version:
_REPLACED = "replaced"  # the champion that it took the place of; so the way back has more than one step
_ROLLED_BACK = "rolled_back"  # when; no pipeline promotes it again


@dataclass(frozen=True)
class Decision:
    """What became of a candidate, or would become of it, and why in one line."""

    version: str
    promoted: bool
    reason: str


@dataclass(frozen=True)
class Check:
    """Whether a champion is as good as it was, in one line, and all that was measured."""

    version: str
    held: bool
    reason: str
    evaluation: Evaluation

    @property
    def figures(self) -> dict[str, float]:
        """The metrics that are numbers."""
        return {name: float(value) for name, value in self.evaluation.metrics.items() if math.isfinite(value)}


def decide(candidate: Mapping[str, float], champion: Mapping[str, float] | None, config: Config) -> tuple[bool, str]:
    """The promotion rule, on held-out metrics: (promote?, why).

    1. A collapsed model is refused: delta PSNR not above `promotion.min_delta_psnr` (its actions change nothing), or a
       smaller share of latent actions in use than `promotion.min_action_usage`.
    2. Without a champion, what is left is promoted.
    3. The higher delta PSNR wins when the difference exceeds its 95% interval (both intervals added in quadrature).
    4. Otherwise the two control alike, and the candidate must draw at least as well: its `rollout_psnr_t1` decides.
    """
    name = f"delta_psnr_t{config.evaluation.horizon}"
    missing = [key for key in (name, "lam_action_usage", "rollout_psnr_t1") if not _finite(candidate.get(key))]
    if missing:
        return False, f"refused: it was not measured: {', '.join(missing)} missing or not a number; evaluate it again"
    delta, usage, picture = candidate[name], candidate["lam_action_usage"], candidate["rollout_psnr_t1"]
    if delta <= config.promotion.min_delta_psnr:
        return False, f"refused: collapsed, {name} {delta:.2f} dB is not above {config.promotion.min_delta_psnr:g}"
    if usage < config.promotion.min_action_usage:
        least = config.promotion.min_action_usage
        return False, f"refused: collapsed, {usage:.0%} of its latent actions are in use, at least {least:.0%} must be"
    if champion is None:
        return True, f"promoted: the first champion, {name} {delta:.2f} dB"
    if not _finite(champion.get(name)) or not _finite(champion.get("rollout_psnr_t1")):
        return (
            False,
            f"refused: the champion has nothing to compare with, no {name}; move the alias by hand to replace it",
        )
    difference, interval = _difference(name, candidate, champion)
    compared = f"{name} {delta:.2f} dB against the champion's {champion[name]:.2f} ({difference:+.2f} ± {interval:.2f})"
    if abs(difference) > interval:
        return difference > 0, f"{'promoted: better' if difference > 0 else 'refused: worse'}, {compared}"
    drawn = f"rollout_psnr_t1 {picture:.2f} dB against {champion['rollout_psnr_t1']:.2f}"
    if picture >= champion["rollout_psnr_t1"]:
        return True, f"promoted: level in {compared}, and draws as well or better, {drawn}"
    return False, f"refused: level in {compared}, and draws worse, {drawn}"


def promote(
    version: str, data_uri: str, run: StepRun, name: str = "genie", alias: str = "champion", dry_run: bool = False
) -> Decision:
    """Gives `alias` to `version` (empty: the newest) if the rule of `decide()` says so; tags it with that and why.

    Whichever of the two was not measured on `data_uri`/eval as `run.config` asks, or by other code, is so first; where
    it cannot be, the champion stays, and the reason says so. The champion that goes keeps the alias `previous`. One
    that was rolled back is refused. With `dry_run` nothing in the registry changes.

    MLflow has no compare-and-swap. An alias that moved while this measured is seen, and the rule asked again; in the
    milliseconds between the last look and the move, the later of two promotions wins, unmeasured against the other.
    Either way the version's tag `replaced` says which champion it followed.

    Raises UnknownVersionError when there is no such version.
    """
    client, candidate = run.client, _version(run.client, name, version)
    while True:
        current = aliased(client, name, alias)
        if current is not None and current.version == candidate.version:
            decision = Decision(str(candidate.version), True, f"is the {alias} already")
            break
        decision = _compared(candidate, current, data_uri, run, name, alias, keep=not dry_run)
        if dry_run or not decision.promoted or _crown(client, name, alias, candidate, current):
            break
    if not dry_run and not decision.reason.startswith("is "):
        client.set_model_version_tag(name, decision.version, "decision", decision.reason.partition(":")[0])
        client.set_model_version_tag(name, decision.version, "reason", decision.reason)
        client.update_model_version(name, decision.version, description=decision.reason)
    reason = f"{'dry run, nothing changed: ' if dry_run else ''}{decision.reason}"
    note = client.get_run(run.parent_id).data.tags.get("mlflow.note.content", "").partition("\n\n")[0]
    client.set_tag(run.parent_id, "mlflow.note.content", f"{note}\n\n{name} version {decision.version}: {reason}.")
    now = aliased(client, name, alias)
    summary("promote", f"{name} version {decision.version} {reason}; {alias}: {now.version if now else 'none'}")
    return Decision(decision.version, decision.promoted, reason)


def rollback(client: MlflowClient, name: str = "genie", alias: str = "champion", dry_run: bool = False) -> str:
    """Gives `alias` back to the version that is `previous`; returns what was done, or with `dry_run` would be.

    `previous` then goes to the champion before that one, where there is one. The version that goes is tagged, so that
    no pipeline promotes it again.

    Raises ValueError when there is nothing to go back to.
    """
    current, former = aliased(client, name, alias), aliased(client, name, PREVIOUS)
    lacks = f"no version of {name!r} has the alias {alias if current is None else PREVIOUS!r}"
    if current is not None and former is not None and current.version == former.version:
        lacks = f"version {current.version} of {name!r} has both aliases, {alias!r} and {PREVIOUS!r}"
        former = _replaced_by(client, name, former)  # a move that was cut short
    if current is None or former is None:
        raise ValueError(
            f"there is nothing to go back to: {lacks}; move the alias {alias!r} by hand on MLflow's Models page"
        )
    earlier = _replaced_by(client, name, former)
    if not dry_run:
        client.set_model_version_tag(name, current.version, _ROLLED_BACK, _now())
        client.set_model_version_tag(name, current.version, "decision", "rolled back")
        client.set_registered_model_alias(name, alias, former.version)
        if earlier is not None:
            client.set_registered_model_alias(name, PREVIOUS, earlier.version)
        else:
            client.delete_registered_model_alias(name, PREVIOUS)
    done = "would go" if dry_run else "went"
    before = f"version {earlier.version}" if earlier is not None else "none"
    told = f"{name}: {alias} {done} from version {current.version} back to {former.version}; {PREVIOUS}: {before}"
    summary("rollback", told)
    return told


def check_champion(data_uri: str, run: StepRun, name: str = "genie", alias: str = "champion") -> Check:
    """Measures the version with `alias` on `data_uri`/eval, and compares that with what it was registered with.

    It has held when neither delta PSNR nor the first frame's PSNR is worse by more than the 95% interval of the
    difference; on other levels than then, chance alone says "worse" about one time in twenty. The figures go to `run`
    and the pipeline's run above it; of the version only the tags `checked_at`, `check` and `check_reason` change.

    Raises UnknownVersionError when no version has the alias, ValueError when it cannot be measured on that data.
    """
    client, version = run.client, aliased(run.client, name, alias)
    if version is None:
        raise UnknownVersionError(f"no version of model {name!r} has the alias {alias!r}: there is nothing to check")
    known = registered_metrics(client, version)
    evaluation = _measured(client, name, version, data_uri, run.config)
    compared, worse = [], False
    for metric in (f"delta_psnr_t{run.config.evaluation.horizon}", "rollout_psnr_t1"):
        if not _finite(known.get(metric)) or not _finite(evaluation.metrics.get(metric)):
            raise ValueError(f"version {version.version} has no {metric} to compare: register it through the pipeline")
        difference, interval = _difference(metric, evaluation.metrics, known)
        worse |= difference < -interval
        figures = f"{evaluation.metrics[metric]:.2f} dB, registered with {known[metric]:.2f}"
        compared.append(f"{metric} {figures} ({difference:+.2f} ± {interval:.2f})")
    verdict = "worse" if worse else "held"
    reason = f"{name} version {version.version} {'is worse than it was' if worse else 'holds'}: {'; '.join(compared)}"
    for tag, value in {"checked_at": _now(), "check": verdict, "check_reason": reason}.items():
        client.set_model_version_tag(name, version.version, tag, value)
    client.set_tag(run.parent_id, "check", verdict)
    found = Check(str(version.version), not worse, reason, evaluation)
    evaluation.log_to(run)
    run.result(found.figures)
    summary("check", reason)
    return found


def own_data(run: StepRun, name: str, version: str = "", alias: str = "") -> str:
    """The data set of a version, the newest, or the one with `alias`: where its world was measured as it was trained.

    Empty for one of the pipeline coinrun, whose levels can be collected anew. A version with a larger decoder is asked
    about as the world alone, registered before. Raises UnknownVersionError, and ValueError where none of its runs says.
    """
    client = run.client
    found = aliased(client, name, alias) if alias else _version(client, name, version)
    if found is None:
        raise UnknownVersionError(f"no version of model {name!r} has the alias {alias!r}")
    worlds = [found]
    if trained_at := found.tags.get("trained_at"):
        worlds += client.search_model_versions(f"name = '{name}' and tags.trained_at = '{trained_at}'")
    for world in worlds:
        told = client.get_run(world.run_id).data.tags if world.run_id else {}
        made_by, data_uri = told.get("mlflow.source.name"), told.get("dataset.eval.uri", "").removesuffix("/eval")
        if made_by == "pipelines/coinrun.py":
            return ""
        if made_by != "pipelines/decoder.py" and data_uri:
            summary("promotion", f"{name} version {found.version} is measured on its own data set, {data_uri}")
            return data_uri
    raise ValueError(f"version {found.version} of {name!r} does not say what it was trained on: name it with --data")


def _version(client: MlflowClient, name: str, version: str) -> Any:
    if version:
        try:
            return client.get_model_version(name, version)
        except MlflowException as error:
            raise UnknownVersionError(f"there is no version {version} of model {name!r}: {error.message}") from None
    found = client.search_model_versions(f"name = '{name}'", max_results=1, order_by=["version_number DESC"])
    if not found:
        raise UnknownVersionError(f"model {name!r} has no version yet: run the pipeline {maker(name)}")
    return client.get_model_version(name, found[0].version)


def _compared(
    candidate: Any, current: Any | None, data_uri: str, run: StepRun, name: str, alias: str, keep: bool
) -> Decision:
    if since := candidate.tags.get(_ROLLED_BACK):
        reason = f"refused: it was rolled back on {since}; delete its tag {_ROLLED_BACK!r} to let it compete again"
        return Decision(str(candidate.version), False, reason)
    try:
        reigning = _figures(current, data_uri, run, name, keep) if current is not None else None
        promoted, reason = decide(_figures(candidate, data_uri, run, name, keep), reigning, run.config)
    except ValueError as error:
        promoted = False
        reason = f"refused: it does not compare with the {alias} ({error}); move the alias by hand to replace that"
    return Decision(str(candidate.version), promoted, reason)


def _figures(version: Any, data_uri: str, run: StepRun, name: str, keep: bool) -> dict[str, float]:
    """What a version reaches on `data_uri`/eval, measured there now if it was not; `keep`: for the next time too."""
    client, wanted = run.client, measured_on(run.config, data_uri)
    if version.tags.get(MEASURED_ON) == wanted:
        return registered_metrics(client, version)
    summary("promote", f"{name} version {version.version} was measured otherwise: measures it as the run's config asks")
    figures = _measured(client, name, version, data_uri, run.config).metrics
    if keep:
        mlflow.set_tracking_uri(client.tracking_uri)
        mlflow.log_metrics(figures, run_id=version.run_id, model_id=logged_model(version))
        client.set_model_version_tag(name, version.version, MEASURED_ON, wanted)
    return figures


def _measured(client: MlflowClient, name: str, version: Any, data_uri: str, config: Config) -> Evaluation:
    """Measures what MLflow holds of a version, sampled as it is served."""
    genie = load_model(str(download(client, name, version)))
    drawn, wanted = genie.config.frame_shape, config.frame_shape
    if drawn != wanted:
        raise ValueError(
            f"version {version.version} draws {drawn[1]} x {drawn[0]} pixels, the config says {wanted[1]} x {wanted[0]}"
        )
    asked = {"data": config.data, "evaluation": config.evaluation, "seed": config.seed}
    held_out = HeldOut.open(f"{data_uri}/eval", config.evaluation.clips, drawn)
    return measure(genie.config.model_copy(update=asked), genie, held_out)


def _crown(client: MlflowClient, name: str, alias: str, candidate: Any, current: Any | None) -> bool:
    """Moves the alias, unless it has moved since `current` was seen. Cut short at any line, it leaves a champion."""
    now = aliased(client, name, alias)
    if (now and now.version) != (current and current.version):
        return False
    if current is not None:
        client.set_model_version_tag(name, candidate.version, _REPLACED, current.version)
        client.set_registered_model_alias(name, PREVIOUS, current.version)
    client.set_registered_model_alias(name, alias, candidate.version)
    return True


def _replaced_by(client: MlflowClient, name: str, version: Any) -> Any | None:
    """The champion whose place `version` took, if it is there still and was not rolled back."""
    number = version.tags.get(_REPLACED)
    if not number:
        return None
    try:
        replaced = client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return None if _ROLLED_BACK in replaced.tags else replaced


def _difference(metric: str, one: Mapping[str, float], other: Mapping[str, float]) -> tuple[float, float]:
    """By how much the first is higher, and half the width of that difference's 95% interval."""
    interval = math.hypot(one.get(f"{metric}_ci95", 0.0), other.get(f"{metric}_ci95", 0.0))
    return one[metric] - other[metric], interval


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
