"""Is the champion as good as it was?"""

from typing import NamedTuple

from kfp import dsl


@dsl.component(base_image="genie-collect", install_kfp_package=False)
def check_champion(
    preset: str,
    overrides: list,
    root_uri: str,
    tracking_uri: str,
    experiment: str,
    fresh: bool,
    metrics: dsl.Output[dsl.Metrics],
    pictures: dsl.Output[dsl.HTML],
    confusion: dsl.Output[dsl.ClassificationMetrics],
    data_uri: str = "",
    model_name: str = "genie",
) -> NamedTuple("Checked", [("held", bool), ("reason", str)]):
    """Measures the champion again, on that data set's held-out video. Returns whether it holds, and why.

    Without a `data_uri` on the champion's own; one of CoinRun on today's levels, or the registered ones.
    """
    from json import dumps
    from pathlib import Path

    from genie_model.data.coinrun import collect, of_today
    from genie_model.metrics import DIRECTIONS
    from genie_model.report import html_page
    from genie_model.tracking import check_champion as check
    from genie_model.tracking import own_data, step

    where = {"root_uri": root_uri, "tracking_uri": tracking_uri, "experiment": experiment, "pipeline": "champion"}
    with step("check-champion", preset, overrides, **where, ends_pipeline=True) as run:
        data_uri = data_uri or own_data(run, model_name, alias="champion")
        if not data_uri:
            data_uri = collect(of_today(run.config) if fresh else run.config, root_uri, run, splits=("eval",))
        run.dataset(data_uri, splits=("eval",))
        found = check(data_uri, run, model_name)
        metrics.metadata.update(found.figures)
        if found.evaluation.confusion is not None:
            confusion.log_confusion_matrix(list(DIRECTIONS), found.evaluation.confusion.tolist())
        for artifact in (metrics, confusion):
            Path(artifact.path).write_text(dumps(artifact.metadata))
        Path(pictures.path).write_text(html_page(found.reason, found.figures, found.evaluation.pictures))
    return found.held, found.reason
