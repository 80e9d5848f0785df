"""ResNet-18 (He et al., 2016), and the classifier of clips that the data are curated with (App. B.1)."""

from __future__ import annotations

import struct

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from genie_model import files
from genie_model.chance import Chance
from genie_model.config import Config

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours: pretrained nets know them so


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut, which a third fits where size or channels change."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = (
            nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            if stride > 1 or channels != out
            else nn.Identity()
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        h_NCHW = F.relu(self.bn1(self.conv1(x_NCHW)))
        return F.relu(self.bn2(self.conv2(h_NCHW)) + self.downsample(x_NCHW))


class ResNet18(nn.Module):
    """Parameters are named as torchvision names them, so that its weights load. `width` 64 is ResNet-18's."""

    mean_C11: Tensor
    deviation_C11: Tensor

    def __init__(self, width: int = 64, outputs: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(BasicBlock(width, width, 1), BasicBlock(width, width, 1))
        self.layer2 = _stage(width)
        self.layer3 = _stage(2 * width)
        self.layer4 = _stage(4 * width)
        self.fc = nn.Linear(8 * width, outputs)
        self.register_buffer("mean_C11", torch.tensor(_MEAN)[:, None, None], persistent=False)
        self.register_buffer("deviation_C11", torch.tensor(_DEVIATION)[:, None, None], persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x_NCHW: Tensor) -> Tensor:
        """(N, 8 * width), of pictures of any size in [0, 1]."""
        h_NCHW = F.relu(self.bn1(self.conv1((x_NCHW - self.mean_C11) / self.deviation_C11)))
        h_NCHW = F.max_pool2d(h_NCHW, 3, stride=2, padding=1)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            h_NCHW = layer(h_NCHW)
        return h_NCHW.mean((2, 3))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        out: Tensor = self.fc(self.features(x_NCHW))
        return out

    def load_pretrained(self, uri: str) -> None:
        """Takes over the weights in that safetensors file, without the last layer where it has other outputs.

        Raises ValueError where they are missing, broken or of another net.
        """
        own = self.state_dict()
        try:
            tensors = load_tensors(files.read(uri))
        except FileNotFoundError:
            raise ValueError(f"curation.weights_uri: there are no weights at {uri}") from None
        except (SafetensorError, struct.error) as error:
            raise ValueError(f"curation.weights_uri: {uri} is no whole safetensors file ({error})") from None
        if len(tensors.get("fc.weight", ())) != len(own["fc.weight"]):
            tensors |= {name: own[name] for name in ("fc.weight", "fc.bias")}
        try:
            self.load_state_dict(tensors)
        except RuntimeError as error:
            wrong = " ".join(str(error).split())
            raise ValueError(f"curation.weights_uri: {uri} is not a ResNet-18 of this width: {wrong[:200]}") from None


def _stage(channels: int) -> nn.Sequential:
    """Half the size, twice the channels."""
    return nn.Sequential(BasicBlock(channels, 2 * channels, 2), BasicBlock(2 * channels, 2 * channels, 1))


class ClipClassifier(nn.Module):
    """Is a clip good? A ResNet-18 sees a few of its frames by themselves; the mean of their features decides."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.net = ResNet18(config.curation.width, outputs=1)

    def forward(self, x_BTHWC: Tensor, good_B: Tensor, chance: Chance) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and logs of frames in [0, 1] of labelled clips, `good_B` 1 for a good one and 0 for a bad one.

        Every other clip is mirrored.
        """
        mirrored_B = chance.of_clips("mirror") < 0.5
        x_BTHWC = torch.where(mirrored_B[:, None, None, None, None], x_BTHWC.flip(3), x_BTHWC)
        logit_B = self.logit(x_BTHWC)
        loss = F.binary_cross_entropy_with_logits(logit_B, good_B.float())
        accuracy = ((logit_B > 0) == (good_B > 0)).float().mean()
        return loss, {"cross_entropy": loss.detach(), "accuracy": accuracy}

    def logit(self, x_BTHWC: Tensor) -> Tensor:
        """Float32 (B,): its sigmoid is the probability of a good clip, were as many good as bad."""
        features_ND = self.net.features(x_BTHWC.flatten(0, 1).permute(0, 3, 1, 2))
        features_BTD = features_ND.view(*x_BTHWC.shape[:2], -1)
        logit_B1: Tensor = self.net.fc(features_BTD.mean(1))
        return logit_B1.float()[:, 0]
