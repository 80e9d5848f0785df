"""How well the true direction can be told from pixels at all: what a latent action is to be measured against."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from genie_model.metrics import DIRECTIONS, Estimate, balanced_accuracy
from genie_model.progress import bar

_BATCH = 128


def supervised_bound(
    frames_FHWC: NDArray[np.uint8],
    middle_N: NDArray[np.int64],
    direction_N: NDArray[np.int64],
    levels_N: NDArray[np.int64],
    *,
    steps: int = 300,
    seed: int = 0,
) -> Estimate:
    """Balanced accuracy of a small net that is *told* the direction of every transition in one half of the levels.

    It sees frames m - 1, m and m + 1 of `frames_FHWC` for each m in `middle_N`, learns on every other level and is
    scored on the rest. As the camera follows the agent, it looks at the middle of the frame only.
    """
    height, width = frames_FHWC.shape[1:3]
    crop_FHWC = frames_FHWC[:, height // 4 : height - height // 4, width // 4 : width - width // 4]
    learn_N = np.unique(levels_N, return_inverse=True)[1] % 2 == 0
    learn, score = np.flatnonzero(learn_N), np.flatnonzero(~learn_N)
    labels_N = torch.from_numpy(direction_N)
    weight_C = 1 / np.bincount(direction_N[learn], minlength=len(DIRECTIONS)).clip(1)
    class_weight_C = torch.from_numpy(weight_C / weight_C.mean()).float()

    generator = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):  # reproducible, and leaves the caller's random numbers alone
        torch.manual_seed(seed)
        net = _net(height // 2, width // 2)
        optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
        for _ in bar(range(steps), desc="evaluate: supervised bound", unit="step"):
            batch = generator.choice(learn, _BATCH)
            x_BCHW, label_B = _inputs(crop_FHWC, middle_N[batch]), labels_N[batch]
            mirror_B = torch.from_numpy(generator.random(_BATCH) < 0.5)  # a mirrored left is a right
            x_BCHW = torch.where(mirror_B[:, None, None, None], x_BCHW.flip(-1), x_BCHW)
            label_B = torch.where(mirror_B, len(DIRECTIONS) - 1 - label_B, label_B)
            loss = nn.functional.cross_entropy(net(x_BCHW), label_B, class_weight_C, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()

    net.eval()
    predicted = []
    with torch.inference_mode():
        for batch in np.array_split(score, -(-len(score) // 512)):
            x_BCHW = _inputs(crop_FHWC, middle_N[batch])
            predicted.append((net(x_BCHW) + net(x_BCHW.flip(-1)).flip(-1)).argmax(1).numpy())
    return balanced_accuracy(direction_N[score], np.concatenate(predicted), levels_N[score])


def _inputs(frames_FHWC: NDArray[np.uint8], middle_B: NDArray[np.int64]) -> Tensor:
    """The middle frame and what changes before and after it: float (B, 9, H, W)."""
    before, now, after = (
        torch.from_numpy(frames_FHWC[middle_B + offset]).permute(0, 3, 1, 2).float() / 255 for offset in (-1, 0, 1)
    )
    return torch.cat([now * 2 - 1, 4 * (now - before), 4 * (after - now)], dim=1)


def _net(height: int, width: int, channels: int = 16) -> nn.Sequential:
    def block(narrow: int, wide: int, kernel: int) -> list[nn.Module]:
        return [nn.Conv2d(narrow, wide, kernel, stride=2, padding=kernel // 2), nn.GroupNorm(8, wide), nn.ReLU()]

    return nn.Sequential(
        *block(9, channels, 5),
        *block(channels, 2 * channels, 3),
        *block(2 * channels, 2 * channels, 3),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(2 * channels * -(-height // 8) * -(-width // 8), 128),
        nn.ReLU(),
        nn.Linear(128, len(DIRECTIONS)),
    )
