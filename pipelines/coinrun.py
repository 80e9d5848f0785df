"""From CoinRun video to a world that can be played: the pipeline of App. F's case study."""

from kfp import dsl

from components.collect import collect
from components.evaluate import evaluate
from components.promote import promote
from components.register import register
from components.train_tokenizer import train_tokenizer
from components.train_world import train_world
from pipelines.placement import LARGE, MEDIUM, SMALL, place


@dsl.pipeline(
    name="genie-coinrun", description="collect, train the tokenizer, co-train the world, evaluate, register, promote"
)
def coinrun(
    root_uri: str,
    preset: str = "coinrun",
    overrides: list = [],  # noqa: B006 - KFP reads the default, nobody changes it
    tracking_uri: str = "",
    experiment: str = "genie",
) -> str:
    """Trains a Genie on CoinRun and promotes it if it is good enough.

    Args:
        root_uri: Where data sets and models lie, e.g. gs://bucket/genie. What is finished there is reused.
        preset: The named config to start from: coinrun (the paper's), demo, tiny.
        overrides: Changes to the preset, e.g. ["tokenizer.codebook.num_codes=512", "train_world.steps=1000"].
        tracking_uri: The MLflow server; empty takes MLFLOW_TRACKING_URI of the step's environment.
        experiment: The MLflow experiment that the run is recorded in.
    """
    run = {
        "preset": preset,
        "overrides": overrides,
        "root_uri": root_uri,
        "tracking_uri": tracking_uri,
        "experiment": experiment,
    }
    data = place(collect(**run), MEDIUM, "collect")
    tokenizer = place(train_tokenizer(**run, data_uri=data.output), LARGE, "train tokenizer")
    world = place(
        train_world(**run, data_uri=data.output, tokenizer_uri=tokenizer.output), LARGE, "co-train LAM and dynamics"
    )
    held_out = place(
        evaluate(**run, data_uri=data.output, model_uri=world.output), MEDIUM, "evaluate on held-out levels"
    )
    measured = held_out.outputs["Output"]
    version = place(register(**run, data_uri=data.output, model_uri=world.output, metrics=measured), SMALL, "register")
    # MEDIUM: a champion that was measured on other levels is measured again.
    return place(promote(**run, data_uri=data.output, version=version.output), MEDIUM, "promote").output
