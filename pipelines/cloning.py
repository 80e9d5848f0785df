"""Figure 15: what are latent actions worth to an agent?"""

from kfp import dsl

from components.collect import collect
from components.demonstrate import demonstrate
from components.evaluate_policies import evaluate_policies
from components.find_world import find_world
from components.plan import plan
from components.report import report
from components.train_policy import train_policy
from components.train_tokenizer import train_tokenizer
from components.train_world import train_world
from pipelines.placement import place, train
from pipelines.study import of_cell


def cloning(
    root_uri: str,
    preset: str = "coinrun",
    overrides: list = [],  # noqa: B006 - KFP reads the default, nobody changes it
    model_uri: str = "",
    seeds: list = [0, 1, 2, 3, 4],  # noqa: B006
    variants: list = [],  # noqa: B006
    tracking_uri: str = "",
    experiment: str = "genie",
) -> str:
    """Clones an expert from a frozen LAM's labels, and counts the levels that it solves with few true actions.

    `python -m pipelines run cloning --preset demo --model FOLDER` records an expert in each mode of CoinRun; a cell, a
    mode with a seed, trains an oracle and a LAM-based policy and has both play 100 held-out levels: an hour on two
    cores, or 6 minutes a seed at docs/studies' budget. The paper's LAM-based policy equals the oracle from 200 labelled
    transitions on; so does demo's from 50 on, beside an oracle that solves but half of the levels.

    Args:
        root_uri: Where data sets and models lie, e.g. gs://bucket/genie. What is finished there is reused.
        preset: The named config to start from.
        overrides: Changes to the preset, e.g. ["cloning.levels=1000", "cloning.labelled=[0, 200]"].
        model_uri: The trained world whose LAM labels the videos; empty trains one first.
        seeds: Two policies in each mode for each.
        variants: Only these modes, e.g. ["hard"]; empty takes easy and hard.
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
    study = {"name": "cloning"}
    with dsl.If(model_uri == "", name="no world yet"):
        seen = {**run, "study": study, **place(collect(**run, study=study), "medium", "collect", changes=True).outputs}
        tokenizer = train(train_tokenizer, "train tokenizer", **seen)
        made = train(train_world, "co-train LAM and dynamics", **seen, tokenizer_uri=tokenizer.output)
    with dsl.Else(name="a world is there"):
        found = place(find_world(**run, study=study, model_uri=model_uri), "small", "find world")
    world_uri = dsl.OneOf(made.output, found.output)

    no_data = {"data_uri": "", "data_digest": "", "eval_uri": ""}
    asked = run | no_data | {"study": study, "seeds": seeds, "variants": variants, "model_uri": world_uri}
    modes = place(plan(**asked, distinct=["cloning"]), "small", "plan demonstrations", changes=True)
    with dsl.ParallelFor(modes.output, name="modes") as cell:
        shown = place(demonstrate(**of_cell(cell, run)), "medium", "record the expert")
    cells = place(plan(**asked, distinct=[]).after(shown), "small", "plan cells", changes=True)
    cells.ignore_upstream_failure()
    with dsl.ParallelFor(cells.output, name="cells") as cell:
        shown = place(demonstrate(**of_cell(cell, run)), "medium", "record the expert")
        seen = of_cell(cell, run) | {"demonstrations_uri": shown.output}
        oracle = place(train_policy(**seen), "large", "train the oracle")
        latent = place(train_policy(**seen, model_uri=cell.model_uri), "large", "train from latent actions")
        policies = {"latent_uri": latent.output, "oracle_uri": oracle.output, "model_uri": cell.model_uri}
        played = place(evaluate_policies(**seen, **policies), "large", "play held-out levels")
    told = place(report(**run, study=study).after(played), "small", "report")
    told.ignore_upstream_failure()
    told.set_caching_options(False)  # its arguments do not name the cells
    return told.outputs["Output"]
