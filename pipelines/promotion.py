"""The gate alone: may this version be served?"""

from components.promote import promote
from pipelines.placement import place


def promotion(
    root_uri: str,
    preset: str = "coinrun",
    overrides: list = [],  # noqa: B006 - KFP reads the default, nobody changes it
    version: str = "",
    model_name: str = "genie",
    data_uri: str = "",
    dry_run: bool = False,
    tracking_uri: str = "",
    experiment: str = "genie",
) -> str:
    """Makes a registered version the champion if it is better than the one that is served; that one becomes previous.

    Whichever of the two was measured otherwise than preset and overrides say, or by other code, is measured first.

    Args:
        root_uri: Where data sets and models lie, e.g. gs://bucket/genie.
        preset: The named config that says how is measured; of the version's frame size.
        overrides: Changes to the preset, e.g. ["promotion.min_delta_psnr=0.5"].
        version: The version's number; empty takes the newest.
        model_name: The registered model.
        data_uri: The data set whose held-out video both are measured on; empty takes the version's own; levels of
            CoinRun are collected at root_uri.
        dry_run: Say what would happen, and change nothing in the registry.
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
    which = {"version": version, "model_name": model_name, "data_uri": data_uri}
    decided = promote(**run, **which, dry_run=dry_run, pipeline="promotion")
    return place(decided, "medium", "promote").set_caching_options(False).output
