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
    ),
    "vit": ("tokenizer.architecture=vit",),
    "c_vivit": ("tokenizer.architecture=c_vivit",),
    "wide frames": ("data.frame_height=36", "data.frame_width=70"),
}
