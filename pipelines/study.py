"""What every study runs: one data set, each tokenizer once, every cell on its own, then the report."""

from __future__ import annotations

from typing import Any

from kfp import dsl

from components.collect import collect
from components.evaluate import evaluate
from components.plan import plan
from components.report import report
from components.train_tokenizer import train_tokenizer
from components.train_world import train_world
from pipelines.placement import place, train

_TOKENIZER = ["data", "tokenizer", "train_tokenizer", "seed"]  # what decides one
_DATA = ("data_uri", "data_digest")


def run_study(name: str, run: dict[str, Any], seeds: Any, variants: Any) -> Any:
    """Adds the steps to the pipeline that is being defined; returns the report in Markdown.

    `run` holds preset, overrides, root_uri, tracking_uri and experiment. Cells that share a tokenizer find it trained:
    no two of them train it at once. A cell that fails fails alone; the others and the report go on.
    """
    study = {"name": name}
    data = place(collect(**run, study=study), "medium", "collect", changes=True).outputs
    asked = run | data | {"study": study, "seeds": seeds, "variants": variants, "model_uri": "", "eval_uri": ""}
    tokenizers = place(plan(**asked, distinct=_TOKENIZER), "small", "plan tokenizers", changes=True)
    with dsl.ParallelFor(tokenizers.output, name="tokenizers") as cell:
        tokenizer = train(train_tokenizer, "train tokenizer", **of_cell(cell, run, *_DATA))
    cells = place(plan(**asked, distinct=[]).after(tokenizer), "small", "plan cells", changes=True)
    cells.ignore_upstream_failure()
    with dsl.ParallelFor(cells.output, name="cells") as cell:
        of_this = of_cell(cell, run, *_DATA)
        found = train_tokenizer(**of_this, only_find=True)  # cells that share it run at once
        tokenizer = place(found, "small", "find tokenizer")
        world = train(train_world, "co-train LAM and dynamics", **of_this, tokenizer_uri=tokenizer.output)
        measured = place(evaluate(**of_this, model_uri=world.output), "medium", "evaluate on held-out levels")
    made = place(report(**run, study=study).after(measured), "small", "report")
    made.ignore_upstream_failure()
    made.set_caching_options(False)  # its arguments do not name the cells
    return made.outputs["Output"]


def of_cell(cell: Any, run: dict[str, Any], *brought: str) -> dict[str, Any]:
    """A step's arguments; a cell brings URIs along, for kfp.local hands no outer step's output into a loop."""
    return run | {"overrides": cell.overrides, "study": cell.study} | {name: getattr(cell, name) for name in brought}
