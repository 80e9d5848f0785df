"""From CoinRun video to a world that can be played: the pipeline of App. F's case study."""

from components.collect import collect
from components.evaluate import evaluate
from components.promote import promote
from components.register import register
from components.train_tokenizer import train_tokenizer
from components.train_world import train_world
from pipelines.placement import place, train


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
    # The digest says what lies there now: what was made of other data is not taken from KFP's cache.
    data = place(collect(**run), "medium", "collect", changes=True).outputs
    tokenizer = train(train_tokenizer, "train tokenizer", **run, **data)
    world = train(train_world, "co-train LAM and dynamics", **run, **data, tokenizer_uri=tokenizer.output)
    held_out = place(evaluate(**run, **data, model_uri=world.output), "medium", "evaluate on held-out levels")
    made = {"data_uri": data["data_uri"], "model_uri": world.output, "metrics": held_out.outputs["Output"]}
    version = place(register(**run, **made), "small", "register", changes=True)
    # medium: a champion that was measured on other levels is measured again
    decided = promote(**run, data_uri=data["data_uri"], version=version.output)
    return place(decided, "medium", "promote", changes=True).output
