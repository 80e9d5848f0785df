"""An expert's videos for behavioural cloning."""

from kfp import dsl


@dsl.component(base_image="genie-collect", install_kfp_package=False)
def demonstrate(
    preset: str,
    overrides: list,
    root_uri: str,
    tracking_uri: str,
    experiment: str,
    study: dict = {},  # noqa: B006 - KFP reads the default, nobody changes it
) -> str:
    """Records the planning expert on training levels; what is finished is reused. Returns the data set's URI."""
    from genie_model.data.expert import collect_demonstrations
    from genie_model.tracking import step

    where = {"root_uri": root_uri, "tracking_uri": tracking_uri, "experiment": experiment, "study": study}
    with step("demonstrate", preset, overrides, **where) as run:
        part = run.config.cloning
        demonstrations_uri = collect_demonstrations(part.levels, part.mode, root_uri, log=run)
        run.dataset(demonstrations_uri, splits=())
    return demonstrations_uri
