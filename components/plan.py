"""A study's cells: each variant with each seed."""

from kfp import dsl


@dsl.component(base_image="genie-collect", install_kfp_package=False)
def plan(
    preset: str,
    overrides: list,
    root_uri: str,
    tracking_uri: str,
    experiment: str,
    study: dict,
    seeds: list,
    variants: list,
    distinct: list,
    data_uri: str = "",
    data_digest: str = "",
    model_uri: str = "",
    eval_uri: str = "",
) -> list:
    """Returns for each cell its overrides and where it belongs; one for each that differs in the `distinct` parts."""
    from genie_model.tracking import plan as plan_cells
    from genie_model.tracking import step

    where = {"root_uri": root_uri, "tracking_uri": tracking_uri, "experiment": experiment, "study": study}
    with step("plan", preset, overrides, **where) as run:
        cells = plan_cells(
            study["name"], preset, overrides, seeds, variants, distinct, data_uri, run, model_uri, data_digest, eval_uri
        )
    return cells
