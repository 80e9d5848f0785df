"""Step 4: held-out metrics and pictures."""

from kfp import dsl


@dsl.component(base_image="genie-collect", install_kfp_package=False)
def evaluate(
    preset: str,
    overrides: list,
    root_uri: str,
    tracking_uri: str,
    experiment: str,
    data_uri: str,
    model_uri: str,
    metrics: dsl.Output[dsl.Metrics],
    pictures: dsl.Output[dsl.HTML],
    confusion: dsl.Output[dsl.ClassificationMetrics],
    data_digest: str = "",
    eval_uri: str = "",
    eval_digest: str = "",
    study: dict = {},  # noqa: B006 - KFP reads the default, nobody changes it
) -> dict:
    """Measures the model on video it never saw: its data set's held-out ones, or those of another data set, `eval_uri`.

    Returns the metrics; their 95% half widths end in _ci95.
    """
    from json import dumps
    from math import isfinite
    from pathlib import Path

    from genie_model.evaluate import evaluate as measure
    from genie_model.metrics import DIRECTIONS
    from genie_model.report import html_page
    from genie_model.tracking import step

    where = {"root_uri": root_uri, "tracking_uri": tracking_uri, "experiment": experiment, "study": study}
    with step("evaluate", preset, overrides, **where, ends_pipeline="variant" in study) as run:
        run.dataset(data_uri, expected=data_digest)
        if eval_uri:
            run.dataset(eval_uri, splits=("eval",), expected=eval_digest)
        result = measure(run.config, model_uri, eval_uri or data_uri, run)
        measured = {name: float(value) for name, value in result.metrics.items() if isfinite(value)}
        run.result(measured)
        metrics.metadata.update(measured)
        if result.confusion is not None:
            confusion.log_confusion_matrix(list(DIRECTIONS), result.confusion.tolist())
        for artifact in (metrics, confusion):  # kfp.local caches none without a file
            Path(artifact.path).write_text(dumps(artifact.metadata))
        Path(pictures.path).write_text(html_page(f"{run.config.name} on held-out video", measured, result.pictures))
    return measured
