"""The report of a study, from MLflow alone."""

from kfp import dsl


@dsl.component(base_image="genie-collect", install_kfp_package=False)
def report(
    preset: str,
    overrides: list,
    root_uri: str,
    tracking_uri: str,
    experiment: str,
    study: dict,
    page: dsl.Output[dsl.HTML],
) -> str:
    """Compares the finished cells: table, plots and a page. Fails, once it is made, where a cell is missing."""
    from pathlib import Path

    from genie_model.tracking import record_report, step

    where = {"root_uri": root_uri, "tracking_uri": tracking_uri, "experiment": experiment, "study": study}
    with step("report", preset, overrides, **where, ends_pipeline=True) as run:
        found = record_report(study["name"], run)
        Path(page.path).write_text(found.comparison.html())
        found.check()
    return found.comparison.markdown()
