"""Named configs: the paper's (paper.py), and small ones that run on a laptop."""

from __future__ import annotations

from genie_model.config import (
    CloningConfig,
    CodebookConfig,
    Config,
    DataConfig,
    DynamicsConfig,
    EvaluationConfig,
    LAMConfig,
    LargeDecoderConfig,
    OptimizerConfig,
    PolicyConfig,
    SamplingConfig,
    StageConfig,
    TokenizerConfig,
    TransformerConfig,
    _did_you_mean,
)
from genie_model.paper import PAPER_PRESETS


def _demo() -> Config:
    """From nothing to a playable CoinRun in a quarter of an hour on two CPU cores."""
    small = TransformerConfig(num_layers=4, d_model=128, num_heads=2, head_dim=64, qk_norm=False)
    shallow = small.model_copy(update={"num_layers": 2})
    tokenizer_rates = OptimizerConfig(max_lr=1e-3, min_lr=1e-5, muon_lr=6e-3, beta2=0.99, warmup_steps=30)
    world_rates = OptimizerConfig(max_lr=1e-3, min_lr=1e-5, token_lr=2e-3, muon_lr=3e-3, beta2=0.99, warmup_steps=30)
    policy_rates = OptimizerConfig(max_lr=1e-3, min_lr=1e-5, muon_lr=6e-3, beta2=0.99, warmup_steps=30)
    slim = small.model_copy(update={"d_model": 64, "head_dim": 32})
    return Config(
        name="demo",
        data=DataConfig(train_levels=4096, steps_per_level=64, action_hold=8),
        tokenizer=TokenizerConfig(
            patch_size=8,
            codes_per_patch=4,
            encoder=shallow,
            decoder=small.model_copy(update={"num_layers": 6}),
            codebook=CodebookConfig(num_codes=1024, commitment=0.05, normalised=False, learn="ema", ema_decay=0.99),
        ),
        lam=LAMConfig(
            patch_size=8,
            encoder=shallow,
            decoder=shallow,
            codebook=CodebookConfig(num_codes=6, ema_decay=0.0, memory=4096, continuous_steps=200),
            motion_rows=6,
            motion_columns=3,
            predict="motion",
            loss="relative",
        ),
        dynamics=DynamicsConfig(
            transformer=TransformerConfig(num_layers=8, d_model=128, num_heads=4, head_dim=32),
            code_vectors=True,
            clean_frames=0.5,
        ),
        sampling=SamplingConfig(maskgit_steps=1, choice="mean", temperature=0.5, order_noise=0.0, precision="bf16"),
        train_tokenizer=StageConfig(steps=800, batch_size=4, optimizer=tokenizer_rates, checkpoint_every=100),
        train_world=StageConfig(steps=1400, batch_size=4, optimizer=world_rates, checkpoint_every=100),
        evaluation=EvaluationConfig(clips=128),
        policy=PolicyConfig(patch_size=8, transformer=slim, linear_layer=128),
        train_policy=StageConfig(steps=1500, batch_size=16, optimizer=policy_rates, checkpoint_every=250),
        cloning=CloningConfig(levels=320),
        train_large_decoder=StageConfig(steps=800, batch_size=4, optimizer=tokenizer_rates, checkpoint_every=100),
    )


def _video() -> Config:
    """A world of small ordinary videos on two CPU cores, filter included; docs/video.md goes through it."""
    return _demo().with_overrides(
        "name=video",
        "ingest.eval_share=0.2",
        "ingest.clips_per_shard=32",
        "curation.frames=2",
        "curation.steps=200",
        "curation.batch_size=16",
        "train_tokenizer.steps=500",
        "train_world.steps=800",
        "evaluation.clips=64",
    )


def _demo_gpu() -> Config:
    """`demo` wider and longer: ten minutes on one H100, most of them for the world. Guesses in training are drawn."""
    transformers = {"tokenizer.encoder": 4, "tokenizer.decoder": 8, "dynamics.transformer": 12}
    return _demo().with_overrides(
        "name=demo_gpu",
        "data.train_levels=8000",
        "data.steps_per_level=256",
        *(f"{name}.num_layers={layers}" for name, layers in transformers.items()),
        *(f"{name}.{field}" for name in transformers for field in ("d_model=256", "num_heads=4", "head_dim=64")),
        "dynamics.corrupt_tokens=0.8",
        "dynamics.corrupt_by=drawn",
        "train_tokenizer.steps=2500",
        "train_tokenizer.batch_size=32",
        "train_world.steps=4700",
        "train_world.batch_size=64",
        "parallel.compile=true",
    )


def _tiny() -> Config:
    """Every part at its smallest: what the tests train, in seconds. Its pictures mean nothing."""
    tiny = TransformerConfig(num_layers=2, d_model=32, num_heads=2, head_dim=16)
    fast = OptimizerConfig(max_lr=3e-3, min_lr=3e-4, token_lr=1e-2, muon_lr=3e-3, beta2=0.99, warmup_steps=2)
    stage = StageConfig(steps=8, batch_size=2, optimizer=fast, log_every=2, checkpoint_every=4)
    return Config(
        name="tiny",
        data=DataConfig(
            clip_length=8,
            train_levels=8,
            eval_levels=4,
            steps_per_level=24,
            eval_steps_per_level=24,
            levels_per_shard=4,
        ),
        tokenizer=TokenizerConfig(
            patch_size=16,
            codes_per_patch=4,
            encoder=tiny,
            decoder=tiny,
            codebook=CodebookConfig(num_codes=16, memory=256),
        ),
        lam=LAMConfig(
            patch_size=16,
            encoder=tiny,
            decoder=tiny,
            codebook=CodebookConfig(num_codes=4, memory=512),
            motion_rows=2,
            motion_columns=1,
            predict="motion",
            loss="relative",
        ),
        dynamics=DynamicsConfig(transformer=tiny),
        sampling=SamplingConfig(maskgit_steps=2),
        train_tokenizer=stage,
        train_world=stage,
        evaluation=EvaluationConfig(clips=4, grid_prompts=2, grid_repeats=2, probe_steps=20),
        policy=PolicyConfig(patch_size=16, transformer=tiny, linear_layer=32),
        train_policy=stage,
        cloning=CloningConfig(mode="easy", levels=4, labelled=(0, 20), eval_levels=3, max_steps=20),
        large_decoder=LargeDecoderConfig(scale=2),
        train_large_decoder=stage,
    )


_PRESETS = {name: preset.make for name, preset in PAPER_PRESETS.items()} | {
    "demo": _demo,
    "demo_gpu": _demo_gpu,
    "tiny": _tiny,
    "video": _video,
}


def preset_names() -> list[str]:
    return sorted(_PRESETS)


def get_preset(name: str) -> Config:
    """The named config. Raises ValueError that lists the names and offers the closest."""
    if name not in _PRESETS:
        raise ValueError(
            f"unknown preset {name!r}{_did_you_mean(name, preset_names())} Presets: {', '.join(preset_names())}"
        )
    return _PRESETS[name]()
