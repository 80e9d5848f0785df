"""What a config amounts to, without making it: shapes alone are traced, with PyTorch's fake tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from genie_model.chance import Chance
from genie_model.config import Config, StageConfig
from genie_model.config_node import ConfigNode
from genie_model.genie import Genie
from genie_model.layers import PatchGrid
from genie_model.paper import PAPER_PRESETS

_STATE_BYTES = 16  # a trained parameter: float32 weight, gradient and two moments of AdamW


class Cost(NamedTuple):
    """Of one training step, for the batch of all devices."""

    flops: float
    activation_bytes: float  # what the backward pass needs of the forward pass; nothing is recomputed
    flops_of: dict[str, float]  # by name, of each part that is called as a module


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def training_cost(module: nn.Module, config: Config, batch_size: int, precision: str, scale: int = 1) -> Cost:
    """Traces the step of one clip, without the optimizer; a batch costs `batch_size` of them.

    Frames are `scale` times as high and wide as the config says.
    """
    height, width, channels = config.frame_shape
    inputs = [torch.zeros(1, config.data.clip_length, scale * height, scale * width, channels)]
    if config.cached_tokens and isinstance(module, Genie):
        shape = (1, config.data.clip_length, module.tokenizer.num_patches, config.tokenizer.codes_per_patch)
        inputs.append(torch.zeros(shape, dtype=torch.long))
    module.train()
    with FlopCounterMode(display=False) as counter, _kept_bytes(module) as kept:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss, _ = module(*inputs, chance=Chance.of_shapes(1))
        loss.backward()
    module.zero_grad(set_to_none=True)
    counts = counter.get_flop_counts()
    flops_of = {
        name: float(sum(counts[f"{type(module).__name__}.{name}"].values())) * batch_size
        for name, _ in module.named_children()
        if f"{type(module).__name__}.{name}" in counts
    }
    return Cost(counter.get_total_flops() * batch_size, sum(kept.values()) * batch_size, flops_of)


@torch.no_grad()
def play_flops(genie: Genie, config: Config) -> int:
    """Of one played frame behind a full window of history: all MaskGIT steps, the picture, and its becoming past."""
    genie.eval()
    frames_BTHWC = torch.zeros(1, config.data.clip_length - 1, *config.frame_shape, dtype=torch.uint8)
    state = genie.start(frames_BTHWC)
    with FlopCounterMode(display=False) as counter:
        genie.advance(state, torch.zeros(1, dtype=torch.long), config.sampling)
        genie.remember(state)
    flops: int = counter.get_total_flops()
    return flops


def sizes(config: Config) -> dict[str, float]:
    """Parameters of each part, and FLOPs of all steps of each training, and of the dynamics in it."""
    with FakeTensorMode():
        genie = Genie(config)
        found = {f"parameters_{name}": float(num_parameters(part)) for name, part in genie.named_children()}
        found["parameters"] = float(num_parameters(genie))
        for name, part in (("train_tokenizer", genie.tokenizer), ("train_world", genie)):
            stage: StageConfig = getattr(config, name)
            cost = training_cost(part, config, stage.batch_size, stage.precision)
            found[f"flops_{name}"] = cost.flops * stage.steps
            found |= {
                f"flops_{part}": flops * stage.steps for part, flops in cost.flops_of.items() if part == "dynamics"
            }
            genie.tokenizer.requires_grad_(False)
    return found


def describe(config: Config) -> str:
    """The tree, and parameters, FLOPs and memory, beside what the paper reports of the preset."""
    from genie_model.enlarging import Enlarging  # and with it the trainer, which every step need not import

    lines = [*_tree(config), ""]
    with FakeTensorMode():
        genie = Genie(config)
        lines += [f"{'part':<20}{'parameters':>12}"]
        lines += [f"{name:<20}{short(num_parameters(part)):>12}" for name, part in genie.named_children()]
        enlarging, scale = Enlarging(config, genie.tokenizer), config.large_decoder.scale
        lines += [f"{'all':<20}{short(num_parameters(genie)):>12}"]
        lines += [
            f"{'larger decoder':<20}{short(num_parameters(enlarging.decoder)):>12}  beside it, if it is wanted",
            "",
        ]
        genie.tokenizer.requires_grad_(True)  # which Enlarging froze
        titles = ("clips", "tokens", "FLOPs", "all steps", "states", "activations")
        lines += [f"{'training step':<20}" + "".join(f"{title:>12}" for title in titles)]
        lines += [_training_row("tokenizer", genie.tokenizer, config, config.train_tokenizer)]
        genie.tokenizer.requires_grad_(False)
        lines += [_training_row("LAM + dynamics", genie, config, config.train_world)]
        lines += [_training_row("larger decoder", enlarging, config, config.train_large_decoder, scale)]
        played, dynamics = short(play_flops(genie, config)), num_parameters(genie.dynamics)
    lines += ["FLOPs of a step and of all; bytes of all devices, nothing recomputed in the backward pass", ""]
    steps, history = config.sampling.maskgit_steps, config.data.clip_length - 1
    lines += [f"a played frame: {played} FLOPs, for {steps} MaskGIT steps behind {history} frames and the picture"]
    if paper := PAPER_PRESETS.get(config.name):
        lines += [f"the paper, {paper.tables}: {paper.reported}"]
        if paper.dynamics_parameters:
            lines += [f"dynamics here: {dynamics / paper.dynamics_parameters:.2f} of the parameters that it reports"]
    return "\n".join(lines)


def _training_row(name: str, module: nn.Module, config: Config, stage: StageConfig, scale: int = 1) -> str:
    grid = PatchGrid(config.data.frame_height, config.data.frame_width, config.tokenizer.patch_size)
    tokens = stage.batch_size * config.data.clip_length * grid.num_patches * config.tokenizer.codes_per_patch
    cost = training_cost(module, config, stage.batch_size, stage.precision, scale)
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    states = trained * _STATE_BYTES + (num_parameters(module) - trained) * 4
    shown = (stage.batch_size, tokens, cost.flops, cost.flops * stage.steps, states, cost.activation_bytes)
    return f"{name:<20}" + "".join(f"{short(x):>12}" for x in shown)


@contextmanager
def _kept_bytes(module: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of every tensor that autograd keeps for the backward pass, parameters aside, each storage once."""
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept: dict[int, int] = {}
    alive = []  # else a freed storage's number is given to another

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(storage)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield kept


def _tree(node: ConfigNode, indent: str = "") -> list[str]:
    """A line for each node, with the values in it."""
    lines, values = [], []
    for name in type(node).model_fields:
        value = getattr(node, name)
        if isinstance(value, ConfigNode):
            lines += [f"{indent}{name}", *_tree(value, indent + "  ")]
        else:
            values.append(f"{name}={value}")
    return [indent + " ".join(values), *lines] if values else lines


def short(x: float) -> str:
    """Three digits and a unit."""
    for size, unit in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= size:
            return f"{x / size:.3g}{unit}"
    return f"{x:g}"
