"""Step 6: what is served."""

from kfp import dsl


@dsl.component(base_image="genie-collect", install_kfp_package=False)
def promote(
    preset: str,
    overrides: list,
    root_uri: str,
    tracking_uri: str,
    experiment: str,
    version: str,
    data_uri: str = "",
    dry_run: bool = False,
    pipeline: str = "coinrun",
    model_name: str = "genie",
) -> str:
    """Makes the version the champion if it is no worse than the one that is served. Returns the decision in a line.

    Without a `data_uri` they are measured on the version's own data set; of CoinRun the held-out levels of the config
    are collected, where they are not yet.
    """
    from genie_model.data.coinrun import collect
    from genie_model.tracking import own_data, step
    from genie_model.tracking import promote as promote_version

    where = {"root_uri": root_uri, "tracking_uri": tracking_uri, "experiment": experiment, "pipeline": pipeline}
    with step("promote", preset, overrides, **where, ends_pipeline=True) as run:
        measured_on = data_uri or own_data(run, model_name, version)
        measured_on = measured_on or collect(run.config, root_uri, run, splits=("eval",))
        decision = promote_version(version, measured_on, run, model_name, dry_run=dry_run)
    return decision.reason
