"""Larger frames for a world that is there: a larger decoder of its tokens (section 3.1)."""

from components.register import register
from components.train_decoder import train_decoder
from pipelines.placement import place, train


def decoder(
    root_uri: str,
    data_uri: str,
    model_uri: str,
    preset: str = "coinrun",
    overrides: list = [],  # noqa: B006 - KFP reads the default, nobody changes it
    tracking_uri: str = "",
    experiment: str = "genie",
    model_name: str = "genie",
) -> str:
    """Trains a larger decoder for a world, and registers both as a version, which the promotion pipeline may promote.

    Args:
        root_uri: Where models lie, e.g. gs://bucket/genie. What is finished there is reused.
        data_uri: A data set of frames large_decoder.scale times as high and wide as the world's.
        model_uri: The trained world's folder.
        preset: The named config, and below it the overrides, that the world was trained with.
        overrides: Changes to the preset, e.g. ["large_decoder.scale=2", "train_large_decoder.steps=1000"].
        tracking_uri: The MLflow server; empty takes MLFLOW_TRACKING_URI of the step's environment.
        experiment: The MLflow experiment that the run is recorded in.
        model_name: The registered model.
    """
    run = {
        "preset": preset,
        "overrides": overrides,
        "root_uri": root_uri,
        "tracking_uri": tracking_uri,
        "experiment": experiment,
        "study": {"pipeline": "decoder"},
    }
    trained = train(train_decoder, "train the larger decoder", **run, data_uri=data_uri, tokenizer_uri=model_uri)
    both = {"model_uri": model_uri, "large_decoder_uri": trained.output, "data_uri": "", "model_name": model_name}
    return place(register(**run, **both), "small", "register", changes=True).output
