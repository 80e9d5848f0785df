"""A world that was trained before."""

from kfp import dsl


@dsl.component(base_image="genie-collect", install_kfp_package=False)
def find_world(
    preset: str,
    overrides: list,
    root_uri: str,
    tracking_uri: str,
    experiment: str,
    model_uri: str,
    study: dict = {},  # noqa: B006 - KFP reads the default, nobody changes it
) -> str:
    """Fails unless a whole model lies there. Returns its URI."""
    from genie_model.checkpoint import load_config
    from genie_model.tracking import step

    where = {"root_uri": root_uri, "tracking_uri": tracking_uri, "experiment": experiment, "study": study}
    with step("find-world", preset, overrides, **where) as run:
        load_config(model_uri)
        run.made("world", model_uri)
    return model_uri
