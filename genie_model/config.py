"""One typed tree describes a whole experiment.

The same JSON is the command line's input, the pipeline's parameter, the MLflow artifact, the checkpoint's
`config.json` and what serving rebuilds the model from. A variant is a field, never a copied file.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from genie_model.config_node import ConfigNode
from genie_model.video_config import CurationConfig, IngestConfig, PromptsConfig


class DataConfig(ConfigNode):
    """Procgen CoinRun as App. F.1 collects it: hard mode, a uniform random policy, 10M frames over 10,000 levels."""

    frame_height: int = Field(64, ge=8, description="in pixels; Procgen renders 64")
    frame_width: int = Field(64, ge=8, description="in pixels; Procgen renders 64")
    clip_length: int = Field(16, ge=2, description="frames per training clip (section 3)")
    train_levels: int = Field(10_000, ge=1, le=10_000, description="level seeds 0..train_levels-1, each visited once")
    eval_levels: int = Field(64, ge=1, description="held-out level seeds, from eval_first_level on")
    eval_first_level: int = Field(1_000_000, ge=10_000, le=2_000_000_000, description="training seeds end at 9,999")
    steps_per_level: int = Field(1_000, ge=2)
    eval_steps_per_level: int = Field(128, ge=2)
    action_hold: int = Field(1, ge=1, description="steps a random action is held; 1 = the paper's 'no action repeats'")
    levels_per_shard: int = Field(64, ge=1, description="levels simulated side by side and written to one tar")
    seed: int = Field(0, ge=0)


class TransformerConfig(ConfigNode):
    """An ST-transformer (section 2, Figure 4).

    `num_layers` counts attention layers as the paper does: one ST block (spatial attention, temporal attention, one
    feed-forward) is two. An odd count ends on a lone spatial layer. Only this reading reproduces Tables 10 and 12.
    """

    num_layers: int = Field(ge=1)
    d_model: int = Field(ge=8)
    num_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2, multiple_of=2, description="the tables' k/q size; not always d_model / num_heads")
    mlp_ratio: int = Field(4, ge=1)
    temporal_every: int = Field(1, ge=1, description="n: every n-th ST block attends to time")
    qk_norm: bool = Field(True, description="normalise queries and keys (section 3, Training Details)")

    @model_validator(mode="after")
    def _time_is_attended_to(self) -> Self:
        if self.temporal_every > max(self.num_layers // 2, 1):
            limit = f"num_layers={self.num_layers}: at most {max(self.num_layers // 2, 1)}"
            raise ValueError(f"temporal_every={self.temporal_every} leaves no temporal attention in {limit}")
        return self


class CodebookConfig(ConfigNode):
    """A vector-quantizer's codebook (van den Oord et al., 2017)."""

    num_codes: int = Field(ge=2)
    latent_dim: int = Field(32, ge=1)
    commitment: float = Field(0.25, ge=0)
    normalised: bool = Field(True, description="every latent to mean 0 and variance 1; else latents keep their scale")
    learn: Literal["kmeans", "ema", "gradient"] = Field(
        "kmeans",
        description="codes are the k-means of recent latents, or the moving average of those they served, "
        "or learn by gradient as in the first VQ-VAE",
    )
    ema_decay: float = Field(0.9, ge=0, lt=1, description="how much of a code stays when it moves to its latents' mean")
    memory: int = Field(8192, ge=1, description="kmeans: how many recent latents")
    min_share: float = Field(0.05, ge=0, lt=1, description="a code with less of its equal share of latents restarts")
    continuous_steps: int = Field(
        0, ge=0, description="training steps before latents are quantized; over the next 100 they gradually are"
    )


class TokenizerConfig(ConfigNode):
    """The video tokenizer (section 2.1, App. C.2)."""

    architecture: Literal["st_vivit", "vit", "c_vivit"] = Field(
        "st_vivit", description="Table 3: vit sees frames alone, c_vivit attends to space and time at once"
    )
    patch_size: int = Field(4, ge=1)
    codes_per_patch: int = Field(1, ge=1, description="1 as in the paper; 4, 16, ...: one per square of the patch")
    encoder: TransformerConfig
    decoder: TransformerConfig
    codebook: CodebookConfig

    @property
    def token_dim(self) -> int:
        """Numbers in the code vectors of a patch."""
        return self.codes_per_patch * self.codebook.latent_dim


class LargeDecoderConfig(ConfigNode):
    """A second decoder that maps the tokenizer's tokens to larger frames (section 3.1: 160 x 90 become 640 x 360)."""

    scale: int = Field(4, ge=2, le=16, description="times the height and width of data.frame_height and frame_width")
    transformer: TransformerConfig | None = Field(
        None, description="none: the tokenizer's decoder's, and training begins with that one's weights"
    )


class LAMConfig(ConfigNode):
    """The latent action model (section 2.1, App. C.1): pixels in, |A| = codebook.num_codes actions out.

    The defaults are the paper's. `demo` sets the rest: with minutes of training, a code must soon be worth learning.
    """

    inputs: Literal["pixels", "tokens"] = Field("pixels", description="Table 2: tokens enter as their codes' vectors")
    patch_size: int = Field(16, ge=1, description="of pixel inputs; tokens are patches already")
    encoder: TransformerConfig
    decoder: TransformerConfig
    codebook: CodebookConfig
    motion_rows: int = Field(
        0, ge=0, description="patches see how well they match the frame before, shifted up to this"
    )
    motion_columns: int = Field(0, ge=0, description="the same for columns; both 0: no matching")
    predict: Literal["frame", "motion"] = Field(
        "frame",
        description="motion: the patches of the frame before, moved by up to those rows and columns, and a rest",
    )
    loss: Literal["mse", "relative"] = Field("mse", description="relative: every frame's error over that of copying")


class DynamicsConfig(ConfigNode):
    """The MaskGIT dynamics model (section 2.1, App. C.3)."""

    transformer: TransformerConfig
    action: Literal["added", "token"] = Field(
        "added", description="to every token of its frame (section 2.1), or one more token in front of them"
    )
    code_vectors: bool = Field(False, description="tokens are also known, and told, by their codes' vectors")
    clean_frames: float = Field(0.0, ge=0, lt=1, description="share of frames left unmasked, as the past is in play")
    corrupt_tokens: float = Field(
        0.0, ge=0, le=1, description="at most this share of known tokens, drawn for each clip, become wrong ones"
    )
    corrupt_by: Literal["random", "own", "drawn"] = Field(
        "random",
        description="codes at random; or, in half of the frames, what the model itself now guesses, or draws",
    )
    mask_rate_min: float = Field(0.5, ge=0, le=1)
    mask_rate_max: float = Field(1.0, ge=0, le=1)


class SamplingConfig(ConfigNode):
    """How a frame is dreamt (section 2.2): 25 steps; section 3 says temperature 2, Table 17 says 1.0."""

    maskgit_steps: int = Field(25, ge=1)
    precision: Literal["bf16", "fp32"] = Field("fp32", description="of play's matmuls; training has its own")
    compile: bool = Field(
        False,
        description="on CUDA: frames in two thirds of the time, the first ones after a while; on a CPU: in half of it, "
        "best with precision=bf16, once a C++ compiler has worked for a minute for all models of a shape",
    )
    choice: Literal["draw", "mean"] = Field(
        "draw", description="of a token: drawn at random, or the code nearest to the mean of the codes' vectors"
    )
    temperature: float = Field(1.0, ge=0, description="of the token distribution; 0 takes the most likely token")
    last_temperature: float | None = Field(
        None, ge=0, description="it goes there evenly over the steps; none: it stays"
    )
    order: Literal["confidence", "random", "halton"] = Field(
        "confidence", description="which tokens are kept first; halton: spread evenly over the frame"
    )
    order_noise: float = Field(4.5, ge=0, description="Gumbel noise on order=confidence; anneals to 0")


class OptimizerConfig(ConfigNode):
    """AdamW with linear warm-up and cosine decay (Tables 8 and 9)."""

    max_lr: float = Field(gt=0)
    min_lr: float = Field(ge=0)
    token_lr: float = Field(0.0, ge=0, description="peak for embeddings and logits of tokens; 0: max_lr for them too")
    muon_lr: float = Field(0.0, ge=0, description="peak of Muon's, for matrices in transformers; 0: AdamW for them too")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)
    warmup_steps: int = Field(ge=0)
    clip_norm: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.min_lr > self.max_lr:
            raise ValueError(f"min_lr={self.min_lr:g} is above max_lr={self.max_lr:g}")
        return self


class StageConfig(ConfigNode):
    """One training stage of the one trainer."""

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1, description="clips per step")
    optimizer: OptimizerConfig
    precision: Literal["bf16", "fp32"] = "bf16"
    log_every: int = Field(50, ge=1)
    checkpoint_every: int = Field(500, ge=1)
    stall_seconds: float = Field(
        60, gt=0, description="a step that takes longer, and ten times as long as others, is reported (watch.py)"
    )


class EvaluationConfig(ConfigNode):
    """What is measured on held-out levels (section 3, Metrics)."""

    clips: int = Field(64, ge=2)
    prompt_frames: int = Field(1, ge=1, description="real frames a rollout starts from")
    horizon: int = Field(4, ge=1, description="t of delta-t PSNR; the paper reports t = 4")
    grid_prompts: int = Field(4, ge=1, description="rows of the action grid (Figure 17)")
    grid_repeats: int = Field(5, ge=1, description="times each latent action is taken in the grid")
    i3d_uri: str = Field("", description="a TorchScript I3D; with it, fvd_i3d is measured too (video_features.py)")
    i3d_sha256: str = Field("", pattern="^([0-9a-fA-F]{64})?$", description="its checksum: no other file is run")
    held_prompts: int = Field(
        24, ge=2, description="start frames from which each action is held: Figure 17 as a number"
    )
    probe_steps: int = Field(300, ge=1, description="training steps of the supervised bound on telling direction")

    @model_validator(mode="after")
    def _i3d_is_named_whole(self) -> Self:
        if bool(self.i3d_uri) != bool(self.i3d_sha256):
            raise ValueError("i3d_uri and i3d_sha256 go together: set both or neither")
        return self


class PolicyConfig(ConfigNode):
    """The policy of behavioural cloning (App. E.2, Table 14); the table's d_model of 512 is taken to be 8 x 64."""

    patch_size: int = Field(4, ge=1)
    transformer: TransformerConfig = TransformerConfig(num_layers=12, d_model=512, num_heads=8, head_dim=64)
    linear_layer: int = Field(512, ge=1, description="width of the head's hidden layer")
    context: int = Field(4, ge=2, description="frames that it sees, in training as in play")


class CloningConfig(ConfigNode):
    """What the policy is shown, and how it is judged (section 3.3, App. E)."""

    mode: Literal["easy", "hard"] = Field("hard", description="of CoinRun; Figure 15 has both")
    levels: int = Field(10_000, ge=1, le=10_000, description="training levels that the expert is recorded on")
    labelled: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0, 50, 100, 200, 500, 1000),
        min_length=1,
        description="transitions whose true actions are known, to map latent actions to real ones by",
    )
    random_share: float = Field(0.1, ge=0, le=1, description="of its steps the oracle acts at random (App. E.2)")
    eval_levels: int = Field(100, ge=1, description="held-out levels")
    max_steps: int = Field(1_000, ge=1, description="then a level counts as lost; Procgen ends an episode at 1,000")


class ParallelConfig(ConfigNode):
    """Training over several devices (App. C.3). It decides no weights, up to rounding."""

    backend: Literal["native", "xla"] = Field("native", description="CPU and CUDA, or what torch-xla knows: TPU")
    data: int = Field(0, ge=0, description="groups of devices that share the batch; 0: as many as there are")
    fsdp: int = Field(1, ge=1, description="devices that share the batch, and all parameters (stage-3 ZeRO)")
    tensor: int = Field(1, ge=1, description="devices that share heads and feed-forwards of the same clips")
    remat: bool = Field(False, description="ST blocks are computed again in the backward pass, instead of kept")
    compile: bool = Field(False, description="native: sublayers by torch.compile; xla always compiles")
    capture: bool = Field(True, description="one CUDA device: a step's kernels are started as one graph")
    compilation_cache: str = Field("", description="xla: a folder; what it holds is not compiled again")

    def mesh(self, devices: int) -> tuple[int, int, int]:
        """The sizes of (data, fsdp, tensor). Raises ValueError where they do not make up the devices."""
        data = self.data or max(devices // (self.fsdp * self.tensor), 1)
        if data * self.fsdp * self.tensor != devices:
            wanted = f"parallel.data * fsdp * tensor = {data} * {self.fsdp} * {self.tensor}"
            raise ValueError(f"{wanted} devices are asked for, and there are {devices}")
        return data, self.fsdp, self.tensor


class PromotionConfig(ConfigNode):
    """When a candidate may become the champion."""

    min_delta_psnr: float = Field(0.0, description="delta PSNR must lie above this, or the actions do nothing")
    min_action_usage: float = Field(0.5, ge=0, le=1, description="share of latent actions that must be in use")


class Config(ConfigNode):
    """The whole experiment."""

    name: str
    seed: int = Field(0, ge=0, lt=2**31)
    data: DataConfig = DataConfig()
    ingest: IngestConfig = IngestConfig()
    curation: CurationConfig = CurationConfig()
    tokenizer: TokenizerConfig
    lam: LAMConfig
    dynamics: DynamicsConfig
    sampling: SamplingConfig = SamplingConfig()
    train_tokenizer: StageConfig
    train_world: StageConfig
    policy: PolicyConfig = PolicyConfig()
    train_policy: StageConfig = Field(
        StageConfig(
            steps=100_000,
            batch_size=16,
            optimizer=OptimizerConfig(max_lr=3e-5, min_lr=3e-6, beta2=0.96, warmup_steps=5_000),
            checkpoint_every=5_000,
        ),
        description="Table 13; the paper does not say for how many steps",
    )
    cloning: CloningConfig = CloningConfig()
    large_decoder: LargeDecoderConfig = LargeDecoderConfig()
    train_large_decoder: StageConfig = Field(
        StageConfig(
            steps=100_000,
            batch_size=16,
            optimizer=OptimizerConfig(max_lr=3e-4, min_lr=3e-5, warmup_steps=1_000),
            checkpoint_every=5_000,
        ),
        description="the paper gives no figures",
    )
    cached_tokens: bool = Field(
        False,
        description="train_world reads tokens that were computed once (tokens.py); its clips then start at multiples "
        "of data.clip_length",
    )
    evaluation: EvaluationConfig = EvaluationConfig()
    prompts: PromptsConfig = PromptsConfig()
    parallel: ParallelConfig = ParallelConfig()
    promotion: PromotionConfig = PromotionConfig()

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        for part in ("tokenizer", "lam", "policy"):
            patch, least = getattr(self, part).patch_size, min(self.data.frame_height, self.data.frame_width)
            if patch > least:
                raise ValueError(f"{part}.patch_size={patch} is larger than the frame: at most {least}")
        side = math.isqrt(self.tokenizer.codes_per_patch)
        if side**2 != self.tokenizer.codes_per_patch or self.tokenizer.patch_size % side:
            wrong = f"tokenizer.codes_per_patch={self.tokenizer.codes_per_patch}"
            raise ValueError(f"{wrong} must be 1, 4, 16, ...: the square of a number that divides tokenizer.patch_size")
        if self.evaluation.prompt_frames + self.evaluation.horizon > self.data.clip_length:
            limit = f"data.clip_length={self.data.clip_length}"
            raise ValueError(f"evaluation.prompt_frames + evaluation.horizon must be at most {limit}")
        if self.evaluation.i3d_uri and self.data.clip_length < 9:
            raise ValueError(f"evaluation.i3d_uri: I3D needs 9 frames, and data.clip_length={self.data.clip_length}")
        parts = (self.tokenizer.encoder, self.tokenizer.decoder, self.large_decoder.transformer)
        if self.tokenizer.architecture != "st_vivit" and any(part and part.temporal_every > 1 for part in parts):
            raise ValueError(
                f"tokenizer.architecture={self.tokenizer.architecture} has no temporal_every: leave it at 1"
            )
        moves = self.lam.predict == "motion" or self.lam.motion_rows + self.lam.motion_columns
        if self.lam.inputs == "tokens" and moves:
            wanted = "lam.predict=frame, lam.motion_rows=0 and lam.motion_columns=0"
            raise ValueError(f"lam.inputs=tokens have no pixels to match or move: set {wanted} too")
        if self.lam.predict == "motion" and not self.lam.motion_rows + self.lam.motion_columns:
            raise ValueError("lam.predict=motion needs lam.motion_rows or lam.motion_columns above 0")
        if self.cached_tokens and self.tokenizer.codebook.num_codes > 1 << 16:
            raise ValueError("cached_tokens: at most 65,536 codes; lower tokenizer.codebook.num_codes")
        if self.dynamics.mask_rate_min > self.dynamics.mask_rate_max:
            raise ValueError("dynamics.mask_rate_min is above dynamics.mask_rate_max")
        return self

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """Of a frame: height, width, 3."""
        return self.data.frame_height, self.data.frame_width, 3

    @property
    def num_actions(self) -> int:
        """|A|, the number of latent actions."""
        return self.lam.codebook.num_codes

    def to_json(self) -> str:
        return self.model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str) -> Config:
        """Raises ValueError with every field that is wrong."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ValueError(_readable(error)) from None

    def flat(self) -> dict[str, Any]:
        """Dotted names of all leaves, as MLflow's params table shows them."""
        return dict(_leaves(self.model_dump(), ""))

    def digest(self, *parts: str) -> str:
        """12 hex digits that change when any of the named top-level parts changes.

        By default all but `parallel`: on which devices a run goes on makes no other run of it.
        """
        dump = self.model_dump(mode="json", include=set(parts) or None, exclude=None if parts else {"parallel"})
        return hashlib.sha256(json.dumps(dump, sort_keys=True).encode()).hexdigest()[:12]

    def with_overrides(self, *assignments: str) -> Config:
        """A copy with `dotted.name=value` assignments applied; values are read as JSON, else as text.

        Raises ValueError naming the closest field when a name is unknown, and what is allowed when a value is wrong.
        """
        tree = self.model_dump(mode="json")
        for assignment in assignments:
            name, separator, text = assignment.partition("=")
            if not separator:
                raise ValueError(f"override {assignment!r} is not of the form name=value")
            node, *leaf = _walk(tree, name)
            try:
                node[leaf[0]] = json.loads(text)
            except json.JSONDecodeError:
                node[leaf[0]] = text
        return Config.from_json(json.dumps(tree))


def _walk(tree: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    """The node that holds the leaf `name`, and the leaf's own name."""
    *path, leaf = name.split(".")
    node: Any = tree
    for part in path:
        node = node.get(part) if isinstance(node, dict) else None
    if not isinstance(node, dict) or leaf not in node or isinstance(node[leaf], dict):
        known = [leaf_name for leaf_name, _ in _leaves(tree, "")]
        raise ValueError(f"unknown config field {name!r}{_did_you_mean(name, known)}")
    return node, leaf


def _leaves(tree: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    leaves = []
    for name, value in tree.items():
        leaves += _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return leaves


def _did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"; did you mean {close[0]!r}?" if close else ""


def _readable(error: ValidationError) -> str:
    lines = [
        f"{'.'.join(str(part) for part in e['loc']) or 'config'}: {e['msg'].removeprefix('Value error, ')}"
        for e in error.errors()
    ]
    return "; ".join(lines)
