"""From anybody's video files to a world that can be played (App. B.1)."""

from kfp import dsl

from components.curate import curate
from components.evaluate import evaluate
from components.ingest import ingest
from components.keep_all import keep_all
from components.play_prompts import play_prompts
from components.promote import promote
from components.register import register
from components.score import score
from components.train_curator import train_curator
from components.train_tokenizer import train_tokenizer
from components.train_world import train_world
from pipelines.placement import place, train


def video(
    root_uri: str,
    source_uri: str,
    labels_uri: str = "",
    prompts_uri: str = "",
    preset: str = "platformers_404m",
    overrides: list = [],  # noqa: B006 - KFP reads the default, nobody changes it
    model_name: str = "genie-video",
    tracking_uri: str = "",
    experiment: str = "genie",
) -> str:
    """Trains a Genie on video and promotes it if it is good enough; nothing but the frames is read.

    Args:
        root_uri: Where data sets and models lie, e.g. gs://bucket/genie. What is finished there is reused.
        source_uri: A folder or bucket prefix of videos, a manifest of them (CSV or Parquet), or robot episodes.
        labels_uri: What `python -m serving.label` wrote for this data set; empty trains on every clip.
        prompts_uri: A folder of pictures to enter the world from (Figure 10); empty takes the samples made here.
        preset: The named config to start from; of two CPU cores: video.
        overrides: Changes to the preset, e.g. ["ingest.aspect=crop", "curation.threshold=0.9"].
        model_name: The registered model. Worlds of one name compete, so they should be of the same kind of video.
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
    of_video = {**run, "study": {"pipeline": "video"}}
    clips = _looked_at(ingest(**of_video, source_uri=source_uri, prompts_uri=prompts_uri), "ingest").outputs
    every = {name: clips[name] for name in ("data_uri", "data_digest")}
    with dsl.If(labels_uri != "", "labels"):
        given = {**of_video, **every}
        curator = _looked_at(train_curator(**given, labels_uri=labels_uri), "train the classifier")
        scores = _looked_at(score(**given, classifier_uri=curator.outputs["Output"]), "score all clips")
        kept = _looked_at(curate(**given, scores_uri=scores.output), "keep what the rule keeps")
    with dsl.Else("no labels"):
        whole = place(keep_all(**every), "small", "keep all")
    data = {name: dsl.OneOf(kept.outputs[name], whole.outputs[name]) for name in every}
    tokenizer = train(train_tokenizer, "train tokenizer", **of_video, **data)
    world = train(train_world, "co-train LAM and dynamics", **of_video, **data, tokenizer_uri=tokenizer.output)
    held_out = place(evaluate(**of_video, **data, model_uri=world.output), "medium", "evaluate on held-out videos")
    # behind evaluation, which leaves start frames to compare with
    entered = play_prompts(**of_video, model_uri=world.output, images_uri=prompts_uri).after(held_out)
    place(entered, "medium", "enter from pictures").set_caching_options(False)
    made = {"data_uri": data["data_uri"], "model_uri": world.output, "metrics": held_out.outputs["Output"]}
    registered = register(**of_video, **made, model_name=model_name).after(entered)
    version = place(registered, "small", "register", changes=True)
    which = {"data_uri": data["data_uri"], "version": version.output, "model_name": model_name, "pipeline": "video"}
    return place(promote(**run, **which), "medium", "promote", changes=True).output


def _looked_at(task: dsl.PipelineTask, name: str) -> dsl.PipelineTask:
    """Never answered from KFP's cache: what lies at the URIs of videos and labels may have changed."""
    return place(task, "large", name).set_caching_options(False)
