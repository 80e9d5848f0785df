"""Figure 9: what do size and batch size buy?"""

from pipelines.study import run_study


def scaling(
    root_uri: str,
    preset: str = "coinrun",
    overrides: list = [],  # noqa: B006 - KFP reads the default, nobody changes it
    seeds: list = [0, 1, 2],  # noqa: B006
    variants: list = [],  # noqa: B006
    tracking_uri: str = "",
    experiment: str = "genie",
) -> str:
    """Trains dynamics models of several sizes and batch sizes on one tokenizer; loss against FLOPs, with a power law.

    `python -m pipelines run scaling --preset demo` takes as long as 18 co-trainings and 3 tokenizers of the preset, the
    widest twice as long: four hours on two cores, or 9 minutes a seed at docs/studies' budget. The rungs of a
    platformers preset are the paper's (Tables 10 and 11), which finds that every step in size, and in batch size,
    lowers the final training loss; so they do at demo's size.

    Args:
        root_uri: Where data sets and models lie, e.g. gs://bucket/genie. What is finished there is reused.
        preset: The named config to start from.
        overrides: Changes to the preset for every variant, e.g. ["train_world.steps=1000"].
        seeds: One run of every variant for each.
        variants: Only these, e.g. ["width 64, batch 4"]; empty takes all.
        tracking_uri: The MLflow server; empty takes MLFLOW_TRACKING_URI of the step's environment.
        experiment: The MLflow experiment that the study is recorded in.
    """
    run = {
        "preset": preset,
        "overrides": overrides,
        "root_uri": root_uri,
        "tracking_uri": tracking_uri,
        "experiment": experiment,
    }
    return run_study("scaling", run, seeds, variants)
