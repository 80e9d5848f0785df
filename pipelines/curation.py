"""Table 4: is less but better data worth more?"""

from kfp import dsl

from components.curate import curate
from components.evaluate import evaluate
from components.plan import plan
from components.report import report
from components.score import score
from components.train_curator import train_curator
from components.train_tokenizer import train_tokenizer
from components.train_world import train_world
from pipelines.placement import place, train
from pipelines.study import of_cell


def curation(
    root_uri: str,
    data_uri: str = "",
    labels_uri: str = "",
    preset: str = "platformers_404m",
    overrides: list = [],  # noqa: B006 - KFP reads the default, nobody changes it
    seeds: list = [0, 1, 2],  # noqa: B006
    variants: list = [],  # noqa: B006
    eval_uri: str = "",
    tracking_uri: str = "",
    experiment: str = "genie",
) -> str:
    """Trains the same model for as many steps on all clips and on those that a learned filter keeps.

    The filter is a ResNet-18 that learns from people's labels, 5 against 1. Both models are measured on the same
    held-out videos. The paper finds the filtered tenth of its data ahead in FVD.

    Args:
        root_uri: Where data sets and models lie, e.g. gs://bucket/genie. What is finished there is reused.
        data_uri: The data set that was ingested from video.
        labels_uri: What `python -m serving.label` wrote for it.
        preset: The named config to start from.
        overrides: Changes to the preset, e.g. ["curation.threshold=0.9", "curation.confidence=0.8"].
        seeds: One run of every variant for each.
        variants: Only these, e.g. ["curated"]; empty takes original and curated.
        eval_uri: A data set whose held-out videos all are measured on, of play alone, say; empty takes data_uri's.
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
    study = {"name": "curation"}
    given = {**run, "data_uri": data_uri, "study": study}
    # What lies at these URIs may have changed: none of these steps is answered from KFP's cache.
    curator = place(train_curator(**given, labels_uri=labels_uri), "large", "train the classifier", changes=True)
    scores = place(score(**given, classifier_uri=curator.outputs["Output"]), "large", "score all clips", changes=True)
    # A cell brings the scores' URI along as its model's.
    asked = given | {"seeds": seeds, "variants": variants, "model_uri": scores.output}
    asked |= {"data_digest": "", "eval_uri": eval_uri}
    rules = place(plan(**asked, distinct=["curation"]), "small", "plan data sets", changes=True)
    with dsl.ParallelFor(rules.output, name="rules") as cell:
        kept = _curated(cell, run)
    # The digest says what is held out there now: what was measured before an opt-out is not taken from KFP's cache.
    cells = place(plan(**asked, distinct=[]).after(kept), "small", "plan cells", changes=True)
    cells.ignore_upstream_failure()
    with dsl.ParallelFor(cells.output, name="cells") as cell:
        kept = _curated(cell, run)
        of_this = of_cell(cell, run) | {name: kept.outputs[name] for name in ("data_uri", "data_digest")}
        tokenizer = train(train_tokenizer, "train tokenizer", **of_this)
        world = train(train_world, "co-train LAM and dynamics", **of_this, tokenizer_uri=tokenizer.output)
        measured = evaluate(**of_this, model_uri=world.output, eval_uri=eval_uri, eval_digest=cell.eval_digest)
        measured = place(measured, "medium", "evaluate on held-out videos")
    told = place(report(**run, study=study).after(measured), "small", "report")
    told.ignore_upstream_failure()
    told.set_caching_options(False)  # its arguments do not name the cells
    return told.outputs["Output"]


def _curated(cell: object, run: dict[str, object]) -> dsl.PipelineTask:
    """Seeds share a data set: it is made before they run at once, and found there by each."""
    task = curate(**of_cell(cell, run, "data_uri"), scores_uri=cell.model_uri)
    return place(task, "medium", "keep what the rule keeps", changes=True)
