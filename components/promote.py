"""Step 6: what is served."""

from kfp import dsl


@dsl.component(base_image="genie-platform:0.1.0", install_kfp_package=False)
def promote(
    preset: str, overrides: list, root_uri: str, tracking_uri: str, experiment: str, data_uri: str, version: str
) -> str:
    """Makes the version the champion if it is no worse than the one that is served. Returns the decision in a line."""
    from genie_model.tracking import promote as promote_version
    from genie_model.tracking import step

    where = {"root_uri": root_uri, "tracking_uri": tracking_uri, "experiment": experiment}
    with step("promote", preset, overrides, **where, ends_pipeline=True) as run:
        decision = promote_version(version, data_uri, run)
    return decision.reason
