"""A study in MLflow: one run, its cells below it, and the report that is made of them alone."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mlflow import MlflowClient
from mlflow.entities import Run

from genie_model.comparison import Comparison, compare
from genie_model.progress import summary
from genie_model.studies import Study, cells, study
from genie_model.tracking.card import model_card
from genie_model.tracking.runs import StepRun

_CELLS = "genie.cells"  # a study's tag: those that were ever asked for
_ASKED = "genie.asked"  # and when that was last


class UnfinishedStudyError(ValueError):
    """Some of its cells failed or are missing; the report says which."""


class Reported(NamedTuple):
    comparison: Comparison
    card: str
    unfinished: list[str]

    def check(self) -> None:
        """Raises UnfinishedStudyError when a cell has failed."""
        if self.unfinished:
            raise UnfinishedStudyError(f"not finished: {'; '.join(self.unfinished)}; run the study again to make them")


def plan(
    name: str,
    preset: str,
    overrides: Sequence[str],
    seeds: Sequence[int],
    only: Sequence[str],
    distinct: Sequence[str],
    data_uri: str,
    run: StepRun,
    model_uri: str = "",
    data_digest: str = "",
    eval_uri: str = "",
) -> list[dict[str, Any]]:
    """Cells to run, each {"overrides", "study", "data_uri", "data_digest", "model_uri", "eval_digest"} for its steps.

    All of them; or of those whose configs agree in the parts named in `distinct`, the first. The last digest says what
    is now held out at `eval_uri`, if that is given, opt-outs and all.

    Raises ValueError as `studies.cells`, and for a missing data set.
    """
    planned = cells(name, preset, overrides, [int(seed) for seed in seeds], only)
    known = _planned(run.client.get_run(run.parent_id))
    asked = [[cell.variant, cell.seed] for cell in planned]
    run.client.set_tag(run.parent_id, _ASKED, f"{time.time():.3f}")
    run.client.set_tag(run.parent_id, _CELLS, json.dumps(known + [cell for cell in asked if cell not in known]))
    if distinct:
        configs = {run.config.with_overrides(*cell.overrides).digest(*distinct): cell for cell in reversed(planned)}
        planned = [cell for cell in planned if cell in configs.values()]
    eval_digest = run.dataset(eval_uri, splits=("eval",)) if eval_uri else ""
    summary("plan", ", ".join(f"{cell.variant} (seed {cell.seed})" for cell in planned))
    return [
        {
            "overrides": cell.overrides,
            "study": {"name": name, "run": run.parent_id, "variant": cell.variant},
            "data_uri": data_uri,
            "data_digest": data_digest,
            "model_uri": model_uri,
            "eval_digest": eval_digest,
        }
        for cell in planned
    ]


def report(name: str, client: MlflowClient, run_id: str) -> Reported:
    """Of the study that this run is. Raises ValueError when none of its cells has finished."""
    newest = dict[tuple[str, int], Run]()
    own = client.get_run(run_id)
    if (other := own.data.tags.get("study")) != name or "variant" in own.data.tags:
        raise ValueError(f"MLflow run {run_id} is no study {name!r}" + (f" but of {other!r}" if other else ""))
    below = f"tags.`mlflow.parentRunId` = '{run_id}' and tags.variant != ''"
    for run in client.search_runs([own.info.experiment_id], below, order_by=["attributes.start_time"]):
        newest[run.data.tags["variant"], int(run.data.tags["seed"])] = run
    found = dict[str, list[dict[str, float]]]()
    finished, unfinished, commits, measured_on, places = [], [], set[str](), set[str](), set[str]()
    for variant, seed in _planned(own):
        found.setdefault(variant, [])
        cell = newest.get((variant, seed))
        if cell and cell.info.status == "FINISHED":
            finished.append(cell)
            found[variant].append(cell.data.metrics)
            measured_on.add(cell.data.tags.get("dataset.eval.digest", "unknown"))
            places |= {uri for name, uri in cell.data.tags.items() if name == "dataset.eval.uri"}
            commits.add(cell.data.tags.get("mlflow.source.git.commit", "unknown"))
        else:
            status = cell.info.status.lower() if cell else "never started"
            unfinished.append(f"{variant}, seed {seed}: {status}")
    budget = _budget(own, study(name).stages)
    if not finished:
        raise ValueError(f"no cell of this study has finished: {'; '.join(unfinished) or 'none was asked for'}")
    params = own.data.params
    notes = [
        f"Preset {own.data.tags['preset']}; {budget}. A cell is the mean over seeds ± its 95% interval (Student's t).",
        f"Here: {_here(study(name), params)}. In the paper: {study(name).scale}.",
    ]
    if places:
        notes.append(f"Measured on {', '.join(sorted(places))}.")
    if unfinished:
        notes.append(f"Not finished: {'; '.join(unfinished)}. The same run again makes them.")
    if len(commits) > 1:
        notes.append(f"Cells were made by different code: {', '.join(sorted(c[:8] for c in commits))}.")
    if len(measured_on) > 1:
        notes.append("Cells were measured on different held-out videos, and do not compare: name one with all seeds.")
    comparison = compare(study(name), found, notes, Counter(variant for variant, _ in _planned(own)))
    return Reported(comparison, model_card(study(name), name, own, finished), unfinished)


def newest_study(name: str, client: MlflowClient, experiment: str) -> str:
    """The id of the run of that study that was last asked for. Raises ValueError where there is none."""
    study(name)
    where = client.get_experiment_by_name(experiment)
    if where is None:
        raise ValueError(f"MLflow has no experiment {experiment!r}: name another with --experiment")
    of_study = f"tags.study = '{name}' and tags.`genie.pipeline` != ''"
    runs = client.search_runs([where.experiment_id], of_study)
    studies = [run for run in runs if "variant" not in run.data.tags]
    if studies:
        return str(max(studies, key=lambda run: float(run.data.tags.get(_ASKED, 0))).info.run_id)
    raise ValueError(f"experiment {experiment!r} has no run of {name}: `python -m pipelines run {name}` makes one")


def record_report(name: str, run: StepRun) -> Reported:
    """Makes the report of the study that `run` is a step of, and keeps it there: page, table, plots, card, the note."""
    client, found = run.client, report(name, run.client, run.parent_id)
    text = found.comparison.markdown()
    client.log_text(run.parent_id, found.comparison.html(), "report.html")
    client.log_text(run.parent_id, text, "report.md")
    client.log_text(run.parent_id, found.card, "model_card.md")
    for picture, image_HWC in found.comparison.pictures.items():
        client.log_image(run.parent_id, image_HWC, artifact_file=f"{picture}.png")
    client.set_tag(run.parent_id, "mlflow.note.content", f"{text}\nThe models' card is the artifact model_card.md.")
    summary("report", f"{found.comparison.title}: {len(found.comparison.table) - 1} variants")
    return found


def _planned(run: Run) -> list[list[Any]]:
    """[variant, seed] of all that was ever asked for."""
    return list(json.loads(run.data.tags.get(_CELLS, "[]")))


def _here(study: Study, params: Mapping[str, str]) -> str:
    size = f"{params['data.frame_width']}x{params['data.frame_height']}"
    if study.video:
        return f"clips of {params['ingest.clip_seconds']} s at {size} and {params['ingest.fps']} frames a second"
    return f"CoinRun at {size}, {params['data.train_levels']} levels of {params['data.steps_per_level']} frames"


def _budget(run: Run, stages: Mapping[str, str]) -> str:
    params = run.data.params
    return ", ".join(
        f"{params[f'{stage}.steps']} {words} steps of {params[f'{stage}.batch_size']} clips"
        for stage, words in stages.items()
    )
