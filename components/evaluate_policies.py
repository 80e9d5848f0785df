"""How many held-out levels the policies solve."""

from kfp import dsl


@dsl.component(base_image="genie-collect", install_kfp_package=False)
def evaluate_policies(
    preset: str,
    overrides: list,
    root_uri: str,
    tracking_uri: str,
    experiment: str,
    demonstrations_uri: str,
    model_uri: str,
    latent_uri: str,
    oracle_uri: str,
    metrics: dsl.Output[dsl.Metrics],
    study: dict = {},  # noqa: B006 - KFP reads the default, nobody changes it
) -> dict:
    """Plays both policies beside the expert, a random agent and RIGHT and UP held. Returns the shares solved."""
    from json import dumps
    from pathlib import Path

    from genie_model.cloning import evaluate_policies as measure
    from genie_model.tracking import step

    where = {"root_uri": root_uri, "tracking_uri": tracking_uri, "experiment": experiment, "study": study}
    with step("evaluate-policies", preset, overrides, **where, ends_pipeline="variant" in study) as run:
        solved = measure(run.config, demonstrations_uri, model_uri, latent_uri, oracle_uri, run)
        run.result(solved)
        metrics.metadata.update(solved)
        Path(metrics.path).write_text(dumps(solved))  # kfp.local caches no artifact without a file
    return solved
