"""Curation 3: the clips that are kept."""

from typing import NamedTuple

from kfp import dsl


@dsl.component(base_image="genie-collect", install_kfp_package=False)
def curate(
    preset: str,
    overrides: list,
    root_uri: str,
    tracking_uri: str,
    experiment: str,
    data_uri: str,
    scores_uri: str,
    metrics: dsl.Output[dsl.Metrics],
    data_digest: str = "",
    study: dict = {},  # noqa: B006 - KFP reads the default, nobody changes it
) -> NamedTuple("Curated", [("data_uri", str), ("data_digest", str)]):
    """Lists the clips that config.curation's rule keeps, all held-out ones beside them. Returns that data set."""
    from json import dumps
    from pathlib import Path

    from genie_model.data.curation import curate as keep
    from genie_model.data.curation import figures
    from genie_model.tracking import step

    where = {"root_uri": root_uri, "tracking_uri": tracking_uri, "experiment": experiment, "study": study}
    with step("curate", preset, overrides, **where) as run:
        run.dataset(data_uri, expected=data_digest)
        curated_uri = keep(run.config, data_uri, scores_uri, root_uri, run)
        found = figures(run.config, data_uri, curated_uri, scores_uri)
        run.result(found)
        metrics.metadata.update(found)
        Path(metrics.path).write_text(dumps(found))  # kfp.local caches no artifact without a file
        curated_digest = run.dataset(curated_uri)
    return curated_uri, curated_digest
