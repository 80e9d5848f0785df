"""ResNet-18 as it was published, so that weights of others load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from genie_model.chance import Chance
from genie_model.presets import get_preset
from genie_model.resnet import ClipClassifier, ResNet18


def parameters(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def test_it_has_the_published_size_and_torchvision_s_names() -> None:
    net = ResNet18()
    assert parameters(net) == 11_689_512
    names = set(net.state_dict())
    assert len(names) == 122
    assert {"conv1.weight", "bn1.running_mean", "layer1.1.conv2.weight", "fc.bias"} <= names
    assert {"layer2.0.downsample.0.weight", "layer4.0.downsample.1.num_batches_tracked"} <= names
    assert "layer1.0.downsample.0.weight" not in names
    assert [net.state_dict()[name].shape[0] for name in ("layer2.0.conv1.weight", "layer4.1.conv2.weight")] == [
        128,
        512,
    ]
    assert 11.1e6 < parameters(ResNet18(outputs=1)) < 11.2e6, "the paper's 11M"


def test_pretrained_weights_load_without_their_last_layer(tmp_path: Path) -> None:
    theirs, own = ResNet18(width=8, outputs=1000), ResNet18(width=8, outputs=1)
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    last = own.fc.weight.clone()
    own.load_pretrained(str(tmp_path / "weights.safetensors"))
    assert torch.equal(own.layer3[0].conv1.weight, theirs.layer3[0].conv1.weight)
    assert torch.equal(own.fc.weight, last)
    pictures = torch.rand(2, 3, 45, 80)
    assert torch.equal(own.eval().features(pictures), theirs.eval().features(pictures))


def test_weights_that_do_not_fit_are_told(tmp_path: Path) -> None:
    net, path = ResNet18(width=8, outputs=1), tmp_path / "weights.safetensors"
    with pytest.raises(ValueError, match="no weights at"):
        net.load_pretrained(str(path))
    path.write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="no whole safetensors file"):
        net.load_pretrained(str(path))
    save_file(ResNet18(width=16, outputs=1).state_dict(), path)
    with pytest.raises(ValueError, match="not a ResNet-18 of this width"):
        net.load_pretrained(str(path))


def test_the_loss_is_of_mirrored_clips_whose_frames_have_no_order() -> None:
    config = get_preset("tiny").with_overrides("curation.width=8")
    torch.manual_seed(0)
    classifier = ClipClassifier(config).eval()
    clips = torch.rand(2, 3, 32, 48, 3)
    assert torch.allclose(classifier.logit(clips), classifier.logit(clips.flip(1)), atol=1e-5)
    chance = Chance.of_step(0, 0, 2)
    mirrored = torch.where((chance.of_clips("mirror") < 0.5)[:, None, None, None, None], clips.flip(3), clips)
    loss, logs = classifier(clips, torch.tensor([0, 1]), chance=chance)
    wanted = torch.nn.functional.softplus(classifier.logit(mirrored) * torch.tensor([1.0, -1.0])).mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert 0 <= logs["accuracy"] <= 1
