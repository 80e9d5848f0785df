"""What is measured: the model that others' published speeds are of, a small one, and `demo`."""

from __future__ import annotations

from collections.abc import Callable

from genie_model.config import (
    CodebookConfig,
    Config,
    DynamicsConfig,
    LAMConfig,
    OptimizerConfig,
    SamplingConfig,
    StageConfig,
    TokenizerConfig,
    TransformerConfig,
)
from genie_model.presets import get_preset


def _of_width(name: str, blocks: tuple[int, int], d_model: int, num_heads: int, patch: int, batch_size: int) -> Config:
    """The paper's model of `blocks` ST blocks in each half of the tokenizer and LAM, and in the dynamics.

    A block is two of TransformerConfig's layers.
    """
    half, whole = (
        TransformerConfig(num_layers=2 * n, d_model=d_model, num_heads=num_heads, head_dim=d_model // num_heads)
        for n in blocks
    )
    stage = StageConfig(
        steps=1, batch_size=batch_size, optimizer=OptimizerConfig(max_lr=1e-4, min_lr=1e-4, warmup_steps=0)
    )
    return Config(
        name=name,
        tokenizer=TokenizerConfig(
            patch_size=patch, encoder=half, decoder=half, codebook=CodebookConfig(num_codes=1024)
        ),
        lam=LAMConfig(patch_size=16, encoder=half, decoder=half, codebook=CodebookConfig(num_codes=6)),
        dynamics=DynamicsConfig(transformer=whole),
        sampling=SamplingConfig(precision="bf16" if d_model >= 512 else "fp32"),  # what is faster
        train_tokenizer=stage,
        train_world=stage,
    )


CONFIGS: dict[str, Callable[[], Config]] = {
    "case study": lambda: _of_width("case study", (8, 12), d_model=512, num_heads=8, patch=4, batch_size=1),
    "small": lambda: _of_width("small", (4, 4), d_model=128, num_heads=4, patch=8, batch_size=4),
    "demo": lambda: get_preset("demo"),
}
