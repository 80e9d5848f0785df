"""Step 1: the data set."""

from typing import NamedTuple

from kfp import dsl


@dsl.component(base_image="genie-collect", install_kfp_package=False)
def collect(
    preset: str,
    overrides: list,
    root_uri: str,
    tracking_uri: str,
    experiment: str,
    study: dict = {},  # noqa: B006 - KFP reads the default, nobody changes it
) -> NamedTuple("Collected", [("data_uri", str), ("data_digest", str)]):
    """Records CoinRun under a random policy; a finished data set is reused. Returns its URI and its digest."""
    from genie_model.data.coinrun import collect as collect_coinrun
    from genie_model.tracking import step

    where = {"root_uri": root_uri, "tracking_uri": tracking_uri, "experiment": experiment, "study": study}
    with step("collect", preset, overrides, **where) as run:
        data_uri = collect_coinrun(run.config, root_uri, run)
        data_digest = run.dataset(data_uri)
    return data_uri, data_digest
