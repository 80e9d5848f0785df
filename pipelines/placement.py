"""Where a step runs on a cluster: its image and what it asks of a node. kfp.local ignores both."""

from __future__ import annotations

import os
from typing import NamedTuple

from kfp.dsl import PipelineTask


class Node(NamedTuple):
    """What a step's container may use, and how often its step is tried again."""

    cpu: str
    memory: str
    retries: int = 0


SMALL = Node("1", "4Gi")
MEDIUM = Node("4", "16Gi")
LARGE = Node("8", "32Gi", retries=5)  # may be taken away: training saves itself, and the next try carries on


def place(task: PipelineTask, node: Node, name: str) -> PipelineTask:
    """Puts `task` on `node` under the `name` that the UI shows; GENIE_IMAGE names the image to compile in."""
    task.set_display_name(name).set_cpu_limit(node.cpu).set_memory_limit(node.memory)
    if node.retries:
        task.set_retry(node.retries, backoff_duration="30s")
    if image := os.environ.get("GENIE_IMAGE"):
        task.set_container_image(image)
    return task
