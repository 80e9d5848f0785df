"""Table 2: does the latent action model see pixels or tokens?"""

from pipelines.study import run_study


def lam_inputs(
    root_uri: str,
    preset: str = "coinrun",
    overrides: list = [],  # noqa: B006 - KFP reads the default, nobody changes it
    seeds: list = [0, 1, 2],  # noqa: B006
    variants: list = [],  # noqa: B006
    tracking_uri: str = "",
    experiment: str = "genie",
) -> str:
    """Trains the paper's LAM on pixels and on tokens beside the same tokenizer; FVD and delta PSNR over seeds.

    `python -m pipelines run lam_inputs --preset demo` takes as long as 9 co-trainings and 3 tokenizers of the preset:
    two hours on two cores, or 25 minutes at docs/studies' budget. The paper finds pixels better in control, and tokens
    slightly ahead in FVD on one data set of two; at demo's size neither learns controls, the preset's own LAM does.

    Args:
        root_uri: Where data sets and models lie, e.g. gs://bucket/genie. What is finished there is reused.
        preset: The named config to start from; a preset whose LAM is not the paper's adds its own as a third variant.
        overrides: Changes to the preset for every variant, e.g. ["train_world.steps=1000"].
        seeds: One run of every variant for each.
        variants: Only these, e.g. ["pixels"]; empty takes all.
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
    return run_study("lam_inputs", run, seeds, variants)
