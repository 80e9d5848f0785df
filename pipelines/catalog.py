"""Which pipelines there are."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

from genie_model.presets import preset_names

if TYPE_CHECKING:
    from pipelines.placement import Cluster

STUDIES = ("lam_inputs", "tokenizers", "scaling", "cloning", "curation")
UPKEEP = ("champion", "promotion", "rollback")  # of the registry
PIPELINES = ("coinrun", "video", "decoder", *STUDIES, *UPKEEP)


def own_preset(name: str) -> str:
    """Which preset a pipeline takes where none is named: the one in its form."""
    preset = inspect.signature(_function(name)).parameters.get("preset")
    return str(preset.default) if preset else "coinrun"


def pipeline_named(name: str, cluster: Cluster | None = None) -> Any:
    """What kfp compiles for that cluster; for none, what it runs on this machine.

    Their modules hold plain functions: kfp runs one when it becomes a pipeline, and by then its steps must know where
    they are placed. Raises ValueError as `Cluster` does, for images that it cannot name.
    """
    from kfp import dsl

    from pipelines.placement import placed_on

    with placed_on(cluster):
        pipeline = dsl.pipeline(_function(name), name=f"genie-{name.replace('_', '-')}")
    form = pipeline.pipeline_spec.root.input_definitions.parameters
    if "preset" in form:
        form["preset"].description += f" All: {', '.join(preset_names())}."
    return pipeline


def _function(name: str) -> Any:
    return getattr(importlib.import_module(f"pipelines.{name}"), name)
