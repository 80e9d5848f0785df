"""Is what is served still as good as it was? To be run by the clock: `python -m pipelines schedule champion`."""

from components.check_champion import check_champion
from components.verdict import verdict
from pipelines.placement import place


def champion(
    root_uri: str,
    preset: str = "coinrun",
    overrides: list = [],  # noqa: B006 - KFP reads the default, nobody changes it
    fresh: bool = True,
    model_name: str = "genie",
    data_uri: str = "",
    tracking_uri: str = "",
    experiment: str = "genie",
) -> str:
    """Measures the champion again on video that it never saw; fails when it is worse than it was registered with.

    What is measured is what MLflow holds and serving plays. The figures go to an MLflow run, the outcome to the tags
    checked_at, check and check_reason of the version.

    Args:
        root_uri: Where data sets and models lie, e.g. gs://bucket/genie. Levels are collected there.
        preset: The named config that says how is measured; of the champion's frame size.
        overrides: Changes to the preset, e.g. ["evaluation.clips=256"].
        fresh: Of CoinRun on levels of today's own, which no version has met; else on those that versions are registered
            with.
        model_name: The registered model.
        data_uri: The data set whose held-out video it is measured on; empty takes its own, and of CoinRun levels as
            `fresh` says.
        tracking_uri: The MLflow server; empty takes MLFLOW_TRACKING_URI of the step's environment.
        experiment: The MLflow experiment that the run is recorded in.
    """
    run = {
        "preset": preset,
        "overrides": overrides,
        "root_uri": root_uri,
        "tracking_uri": tracking_uri,
        "experiment": experiment,
    }
    checked = place(
        check_champion(**run, fresh=fresh, model_name=model_name, data_uri=data_uri), "medium", "measure the champion"
    ).set_caching_options(False)
    told = verdict(held=checked.outputs["held"], reason=checked.outputs["reason"])
    return place(told, "small", "is it as good as it was?").set_caching_options(False).output
