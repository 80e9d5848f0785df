"""The paper's experiments as configs: every value as its table prints it, and what the paper reports of each.

What the tables leave open is filled in one way everywhere: the LAM's and the CoinRun models' k/q size is 64 (d_model /
num_heads, as in Table 7), the robotics model is Table 11's ("the same hyperparameters found to be best on Platformers",
section 3.2), and the batch of the Platformers tokenizer is Table 6's better one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from genie_model.config import (
    CodebookConfig,
    Config,
    DataConfig,
    DynamicsConfig,
    LAMConfig,
    OptimizerConfig,
    SamplingConfig,
    StageConfig,
    TokenizerConfig,
    TransformerConfig,
)
from genie_model.video_config import IngestConfig


class PaperPreset(NamedTuple):
    """A config, and the words and figures that the paper has for it."""

    make: Callable[[], Config]
    tables: str
    reported: str
    dynamics_parameters: float | None = None


_TABLE_8 = OptimizerConfig(max_lr=3e-4, min_lr=3e-4, warmup_steps=10_000)
_TABLE_9 = OptimizerConfig(max_lr=3e-5, min_lr=3e-6, warmup_steps=5_000)


def _coinrun() -> Config:
    """App. F: Tables 15, 16 and 17, data of F.1."""
    eight_layers = TransformerConfig(num_layers=8, d_model=512, num_heads=8, head_dim=64)
    return Config(
        name="coinrun",
        tokenizer=TokenizerConfig(
            patch_size=4, encoder=eight_layers, decoder=eight_layers, codebook=CodebookConfig(num_codes=1024)
        ),
        lam=LAMConfig(patch_size=16, encoder=eight_layers, decoder=eight_layers, codebook=CodebookConfig(num_codes=6)),
        dynamics=DynamicsConfig(transformer=TransformerConfig(num_layers=12, d_model=512, num_heads=8, head_dim=64)),
        sampling=SamplingConfig(maskgit_steps=25, temperature=1.0),
        train_tokenizer=StageConfig(steps=300_000, batch_size=48, optimizer=_TABLE_8, checkpoint_every=5_000),
        train_world=StageConfig(steps=200_000, batch_size=36, optimizer=_TABLE_9, checkpoint_every=5_000),
    )


def _platformers(name: str, dynamics: TransformerConfig, batch_size: int, steps: int = 200_000) -> Config:
    """Tables 5 and 7 for LAM and tokenizer, with one of the dynamics models of Tables 10 to 12 on top."""
    lam = TransformerConfig(num_layers=20, d_model=1024, num_heads=16, head_dim=64)
    return Config(
        name=name,
        data=DataConfig(frame_height=90, frame_width=160),
        ingest=IngestConfig(keywords="platformers", codec="h264"),  # App. B.1; raw, its 55M clips take 380 TB
        tokenizer=TokenizerConfig(
            patch_size=4,
            encoder=TransformerConfig(num_layers=12, d_model=512, num_heads=8, head_dim=64),
            decoder=TransformerConfig(num_layers=20, d_model=1024, num_heads=16, head_dim=64),
            codebook=CodebookConfig(num_codes=1024),
        ),
        lam=LAMConfig(patch_size=16, encoder=lam, decoder=lam, codebook=CodebookConfig(num_codes=8)),
        dynamics=DynamicsConfig(transformer=dynamics),
        sampling=SamplingConfig(maskgit_steps=25, temperature=2.0),
        train_tokenizer=StageConfig(steps=300_000, batch_size=384, optimizer=_TABLE_8, checkpoint_every=5_000),
        train_world=StageConfig(steps=steps, batch_size=batch_size, optimizer=_TABLE_9, checkpoint_every=5_000),
    )


class Size(NamedTuple):
    """A row of Table 10, in its order."""

    parameters: float
    num_layers: int
    num_heads: int
    d_model: int
    head_dim: int
    hardware: str
    days: int
    flops: float

    @property
    def shape(self) -> TransformerConfig:
        return TransformerConfig(
            num_layers=self.num_layers, d_model=self.d_model, num_heads=self.num_heads, head_dim=self.head_dim
        )


TABLE_10 = {
    "41m": Size(41e6, 18, 8, 512, 64, "64 TPUv2", 3, 2.05e20),
    "96m": Size(96e6, 16, 16, 768, 64, "64 TPUv2", 6, 3.58e20),
    "192m": Size(192e6, 20, 18, 1024, 64, "64 TPUv2", 9, 6.4e20),
    "404m": Size(404e6, 21, 12, 1536, 128, "64 TPUv2", 18, 1.2e21),
    "811m": Size(811e6, 20, 20, 2048, 128, "128 TPUv3", 7, 2.2e21),
    "1.6b": Size(1.6e9, 28, 22, 2560, 128, "128 TPUv3", 12, 4.04e21),
    "2.7b": Size(2.7e9, 36, 22, 3072, 128, "256 TPUv3", 16, 6.91e21),
}
TABLE_11 = TransformerConfig(num_layers=34, num_heads=20, d_model=2560, head_dim=128)
TABLE_11_HARDWARE = {128: "64 TPUv3", 256: "128 TPUv3", 448: "64 TPUv5p"}
_TABLE_12 = TransformerConfig(num_layers=48, num_heads=36, d_model=5120, head_dim=128)


def _table_10(name: str, row: Size) -> PaperPreset:
    reported = f"{row.parameters / 1e6:,.0f}M parameters, {row.days} days on {row.hardware}, {row.flops:.3g} FLOPs"
    return PaperPreset(
        lambda: _platformers(name, row.shape, 256), "Table 10 (and 5, 7, 8, 9)", reported, row.parameters
    )


def _table_11(name: str, batch_size: int) -> PaperPreset:
    reported = f"2.3B parameters on {TABLE_11_HARDWARE[batch_size]}; Figure 9: larger batches end in a lower loss"
    return PaperPreset(lambda: _platformers(name, TABLE_11, batch_size), "Table 11 (and 5, 7, 8, 9)", reported, 2.3e9)


def _robotics() -> Config:
    # RT-1 records three steps a second, and its episodes last about ten: a clip is what training takes.
    return _platformers("robotics", TABLE_11, 256).with_overrides(
        "ingest.keywords=", "ingest.fps=3", "ingest.clip_seconds=5.34"
    )


PAPER_PRESETS = {
    "coinrun": PaperPreset(
        _coinrun,
        "Tables 15, 16, 17 (and 8, 9)",
        "no figures; three days of tokenizer training on one TPU with 16 GB, all of it under a week",
    ),
    **{name: _table_10(name, row) for name, row in ((f"platformers_{size}", row) for size, row in TABLE_10.items())},
    **{
        name: _table_11(name, batch_size)
        for name, batch_size in ((f"platformers_2.3b_batch_{size}", size) for size in TABLE_11_HARDWARE)
    },
    "genie_11b": PaperPreset(
        lambda: _platformers("genie_11b", _TABLE_12, 512, steps=125_000),
        "Table 12 (and 5, 7, 8, 9)",
        "10.1B parameters of dynamics, 10.7B in all, 942B tokens on 256 TPUv5p, 6.6e22 FLOPs",
        10.1e9,
    ),
    "robotics": PaperPreset(
        _robotics,
        "section 3.2 (Tables 11, 5, 7, 8, 9)",
        "2.5B parameters with LAM, FVD 82.7 on the test split (section 3.2)",
        2.3e9,
    ),
}
