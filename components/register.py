"""Step 5: a version in the model registry."""

from kfp import dsl


@dsl.component(base_image="genie-collect", install_kfp_package=False)
def register(
    preset: str,
    overrides: list,
    root_uri: str,
    tracking_uri: str,
    experiment: str,
    data_uri: str,
    model_uri: str,
    metrics: dict = {},  # noqa: B006 - KFP reads the default, nobody changes it
    model_name: str = "genie",
    large_decoder_uri: str = "",
    study: dict = {},  # noqa: B006
) -> str:
    """Makes the model, measured on that data set, a version of the registered model. Returns the version.

    A larger decoder becomes part of it. Without metrics promotion measures.
    """
    from genie_model.tracking import register as register_model
    from genie_model.tracking import step

    where = {"root_uri": root_uri, "tracking_uri": tracking_uri, "experiment": experiment, "study": study}
    ends = study.get("pipeline") == "decoder"
    with step("register", preset, overrides, **where, ends_pipeline=ends) as run:
        version = register_model(model_uri, metrics, data_uri, run, model_name, large_decoder_uri)
    return version
