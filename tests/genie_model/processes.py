"""Processes that start in no time: each is forked from one that has imported torch and run none of it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist

forked = multiprocessing.get_context("forkserver")
# torch.optim imports the last, late
forked.set_forkserver_preload(["genie_model.train", "torch.distributed.fsdp", "torch._dynamo"])


def start(target: Callable[..., None], *arguments: object) -> BaseProcess:
    process = forked.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def ended(*processes: BaseProcess) -> list[int | None]:
    for process in processes:
        process.join(timeout=60)
    return [process.exitcode for process in processes]


def join(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{size}", rank=rank, world_size=size)
