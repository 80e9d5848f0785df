"""Table 3: which tokenizer serves the world best?"""

from pipelines.study import run_study


def tokenizers(
    root_uri: str,
    preset: str = "coinrun",
    overrides: list = [],  # noqa: B006 - KFP reads the default, nobody changes it
    seeds: list = [0, 1, 2],  # noqa: B006
    variants: list = [],  # noqa: B006
    tracking_uri: str = "",
    experiment: str = "genie",
) -> str:
    """Trains vit, c_vivit and st_vivit tokenizers of equal parameters, each with the same LAM and dynamics on top.

    `python -m pipelines run tokenizers --preset demo` takes as long as 9 tokenizers and 9 co-trainings of the preset,
    c_vivit's twice as long: two and a half hours on two cores, or 50 minutes at docs/studies' budget. The paper finds
    st_vivit ahead in FVD and delta PSNR, and c_vivit hungriest for memory.

    Args:
        root_uri: Where data sets and models lie, e.g. gs://bucket/genie. What is finished there is reused.
        preset: The named config to start from.
        overrides: Changes to the preset for every variant, e.g. ["train_world.steps=1000"].
        seeds: One run of every variant for each.
        variants: Only these, e.g. ["vit"]; empty takes all.
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
    return run_study("tokenizers", run, seeds, variants)
