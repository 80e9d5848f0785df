"""How ordinary video becomes a data set, which of its clips are kept (App. B.1), and what is played from pictures."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from genie_model.config_node import ConfigNode


class IngestConfig(ConfigNode):
    """Video files to clips: 16 s at 10 frames a second (App. B.1); their size is data.frame_height and frame_width."""

    fps: float = Field(10.0, gt=0, le=120)
    clip_seconds: float = Field(16.0, gt=0, description="a rest at a video's end that is shorter makes no clip")
    aspect: Literal["pad", "crop", "stretch"] = Field(
        "pad", description="where a video's shape is not the frame's: black bars, the middle alone, or squeezed"
    )
    codec: Literal["zstd", "h264"] = Field("zstd", description="lossless, or a tenth of the bytes")
    quality: int = Field(18, ge=0, le=51, description="h264's CRF; lower is better")
    clips_per_shard: int = Field(256, ge=1, description="at most, in one tar")
    eval_share: float = Field(0.05, gt=0, lt=1, description="of the videos, held out whole; one at least")
    keywords: str = Field(
        "", description="URI of a filter, or platformers, the package's own; empty: titles do not count"
    )
    opt_out: str = Field("", description="URI of a list in opt_out.txt's form: what stays out from the beginning")
    max_pixels: int = Field(8192 * 4320, ge=1, description="of a source frame; larger ones are rejected")
    stall_seconds: float = Field(
        600.0, gt=0, le=86_400, description="without a clip, after which a video's process is ended: its decoder hangs"
    )
    workers: int = Field(0, ge=0, description="processes; 0: one for each core. They decide no bytes")
    seed: int = Field(0, ge=0)


class CurationConfig(ConfigNode):
    """The learned filter (App. B.1): a ResNet-18 tells good clips, labelled 5, from bad ones, labelled 1."""

    frames: int = Field(4, ge=1, description="of a clip that the classifier sees, evenly spread")
    width: int = Field(64, ge=8, description="channels of the first stage; 64: ResNet-18 with its 11M parameters")
    steps: int = Field(500, ge=1)
    batch_size: int = Field(32, ge=1)
    lr: float = Field(1e-3, gt=0)
    held_out: float = Field(0.2, gt=0, lt=1, description="share of the labelled videos that measure it")
    threshold: float = Field(0.5, ge=0, le=1, description="a clip is kept whose probability of being good is at least")
    confidence: float = Field(
        0.0,
        ge=0,
        le=1,
        description="and, above 0, where the classifier is at least this sure that it is good, 2p - 1",
    )
    weights_uri: str = Field("", description="pretrained ResNet-18 weights (safetensors) to start from; empty: none")
    seed: int = Field(0, ge=0)


class PromptsConfig(ConfigNode):
    """How worlds are entered from pictures unlike any training data (Figure 10)."""

    hold: int = Field(4, ge=1, description="times each latent action is taken in a row, as in the figure")
    hold_longer: int = Field(16, ge=1, description="and once more, to see what lasts")
    aspect: Literal["crop", "pad", "stretch"] = Field(
        "crop", description="where a picture's shape is not the frame's; crop is what the service does with uploads"
    )
    shown: int = Field(16, ge=1, description="rows of a picture grid, at most; all prompts are measured")

    @model_validator(mode="after")
    def _longer_is_longer(self) -> Self:
        if self.hold_longer < self.hold:
            raise ValueError(f"hold_longer={self.hold_longer} is below hold={self.hold}")
        return self
