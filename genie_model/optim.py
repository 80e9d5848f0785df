"""AdamW as the paper trains with it: warm-up, cosine decay, clipping (Tables 8 and 9). Beside it Muon, where asked for.

Muon (Jordan et al., 2024) orthogonalises the update of a matrix, so that what few examples ask for is learnt as fast as
what all do. It is made for the matrices inside transformers; embeddings, outputs, gains and biases stay with AdamW.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from genie_model.config import OptimizerConfig
from genie_model.layers import STTransformer, TokenLinear


class Optimizers:
    """All optimizers of a module, as one. Learning rates are a peak times a share that is the step's."""

    def __init__(self, module: nn.Module, config: OptimizerConfig, traced: bool = False) -> None:
        """`traced`: a step is recorded as a program, in which AdamW's rates and counts must be tensors (XLA)."""
        self.config = config
        trained = [p for p in module.parameters() if p.requires_grad]
        inner = _inside_transformers(module) if config.muon_lr else set[Tensor]()
        tokens = {p for m in module.modules() if isinstance(m, nn.Embedding | TokenLinear) for p in m.parameters()}
        linear = {m.weight for m in module.modules() if isinstance(m, nn.Linear)} - inner - tokens
        token_lr, decay = config.token_lr or config.max_lr, config.weight_decay
        # Weight decay acts on matrices of linear and embedding layers; gains, biases and positions are left alone.
        groups = [
            {"params": [p for p in trained if p in linear], "weight_decay": decay},
            {"params": [p for p in trained if p in tokens and p.ndim > 1], "weight_decay": decay, "lr": token_lr},
            {"params": [p for p in trained if p in tokens and p.ndim == 1], "weight_decay": 0.0, "lr": token_lr},
            {"params": [p for p in trained if p not in linear | tokens | inner], "weight_decay": 0.0},
        ]
        betas = (config.beta1, config.beta2)
        groups = [group for group in groups if group["params"]]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, config.max_lr, betas, fused=not traced, capturable=traced)
        ]
        if muon := [p for p in trained if p in inner]:
            # match_rms_adamw: updates as large as AdamW's, so that both take learning rates of one kind
            self.parts.append(
                torch.optim.Muon(muon, config.muon_lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
            )
        self._peaks = [(group, group["lr"]) for part in self.parts for group in part.param_groups]

    def step(self, share: float = 1.0) -> None:
        """Moves the parameters, at `share` of the peak learning rates, and forgets their gradients."""
        for group, peak in self._peaks:
            group["lr"] = share * peak
            if group.get("capturable"):  # a vector of one: XLA takes scalars of equal value for the same input
                group["lr"] = torch.tensor([share * peak]).to(group["params"][0].device)
        for part in self.parts:
            part.step()
            part.zero_grad(set_to_none=True)

    def start(self) -> None:
        """A step without effect: what optimizers remember is there, and the first true step is like all others."""
        for parameter in (p for part in self.parts for group in part.param_groups for p in group["params"]):
            parameter.grad = torch.zeros_like(parameter)
        self.step(share=1e-30)  # by a rate of 0, AdamW would divide
        for state in (state for part in self.parts for state in part.state.values() if "step" in state):
            state["step"].zero_()

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """What the optimizers remember, as `<parameter's name>|<key>`."""
        states: dict[Tensor, dict[str, Tensor]] = {p: state for part in self.parts for p, state in part.state.items()}
        return {
            f"{name}|{key}": value
            for name, parameter in module.named_parameters()
            for key, value in states.get(parameter, {}).items()
        }

    def fill(self, module: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Takes over what `tensors` gave of a module like this one."""
        parameters = dict(module.named_parameters())
        owners = {p: part for part in self.parts for group in part.param_groups for p in group["params"]}
        for label, value in tensors.items():
            name, _, key = label.rpartition("|")
            parameter = parameters[name]
            owners[parameter].state[parameter][key] = value.to(parameter.device)


def learning_rate_share(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Of the peak: linear from 0 to 1 over the warm-up, then a cosine down to min_lr / max_lr at the last step."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    least = config.min_lr / config.max_lr
    return least + 0.5 * (1 - least) * (1 + math.cos(math.pi * progress))


def _inside_transformers(module: nn.Module) -> set[Tensor]:
    transformers = [m for m in module.modules() if isinstance(m, STTransformer)]
    return {m.weight for transformer in transformers for m in transformer.modules() if isinstance(m, nn.Linear)}
