"""What the models' tests run on: `tiny` as it is, the paper's LAM, and every variant that the paper compares."""

_PAPER_LAM = ("lam.motion_rows=0", "lam.motion_columns=0", "lam.predict=frame", "lam.loss=mse")

VARIANTS: dict[str, tuple[str, ...]] = {
    "demo's LAM": (),
    "paper's LAM": _PAPER_LAM,
    "LAM on tokens": (*_PAPER_LAM, "lam.inputs=tokens"),
    "known by vectors": (
        "dynamics.code_vectors=true",
        "tokenizer.codebook.normalised=false",
        "tokenizer.codebook.learn=ema",
        "dynamics.corrupt_tokens=0.5",
        "dynamics.corrupt_by=own",
    ),
    "gradient codebooks": ("tokenizer.codebook.learn=gradient", "lam.codebook.learn=gradient"),
    "actions as tokens": ("dynamics.action=token", "dynamics.corrupt_tokens=0.2"),
    "time in every second block": (
        *(f"{part}.num_layers=4" for part in ("tokenizer.encoder", "tokenizer.decoder", "dynamics.transformer")),
        *(f"{part}.temporal_every=2" for part in ("tokenizer.encoder", "tokenizer.decoder", "dynamics.transformer")),
    ),
    "vit": ("tokenizer.architecture=vit",),
    "c_vivit": ("tokenizer.architecture=c_vivit",),
    "wide frames": ("data.frame_height=36", "data.frame_width=70"),
}
