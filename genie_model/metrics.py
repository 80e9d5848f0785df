"""What is measured on held-out levels, as pure functions on arrays (torch CPU tensors are arrays too).

Frames of one level resemble each other, so levels, not frames, are the sample: every interval resamples whole levels.
For that, a statistic is written as a function of totals: each level contributes an array of sums (errors, counts, a
confusion table), a resample adds up the levels that it drew, and the statistic reads the total. Of ordinary video, what
is called a level here is a source video.

Legend: N samples, L levels, R resamples, K latent codes, C true classes, D features; B T H W C as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# CoinRun's 15 actions: the last six are the keys D A W S Q E, which the game ignores, so they count as "none".
COINRUN_KEYS = ("left down", "left", "left up", "down", "none", "up", "right down", "right", "right up")
DIRECTIONS = ("left", "none", "right")
MAX_PSNR = 100.0  # dB, what equal frames score; infinity would spoil every mean
MIN_ACTION_SHARE = 0.01  # a latent action that explains fewer transitions than this is not in use


class Estimate(NamedTuple):
    """A statistic and the half width of its 95% interval over levels."""

    value: float
    ci95: float


class VideoFeatures(Protocol):
    """What a Frechet video distance compares; `name` goes into the metric's name."""

    name: str

    def __call__(self, videos_BTHWC: NDArray[np.uint8]) -> Floats:
        """Features (B, D)."""


# --- intervals over levels ---


def bootstrap(
    totals_LX: ArrayLike, statistic: Callable[[Any], float], *, resamples: int = 1000, seed: int = 0
) -> Estimate:
    """`statistic` of the levels' summed totals (L, ...), with a percentile bootstrap over levels."""
    totals_LX = np.asarray(totals_LX, np.float64)
    num_levels = len(totals_LX)
    draws_RL = np.random.default_rng(seed).multinomial(num_levels, np.full(num_levels, 1 / num_levels), size=resamples)
    values_R = [statistic(np.tensordot(draws_L, totals_LX, axes=1)) for draws_L in draws_RL.astype(np.float64)]
    low, high = np.nanpercentile(values_R, [2.5, 97.5])
    return Estimate(float(statistic(totals_LX.sum(0))), float(high - low) / 2)


def mean_over_levels(values_N: ArrayLike, levels_N: ArrayLike) -> Estimate:
    """The mean of all values, with its interval over the levels that they came from."""
    values_N = np.asarray(values_N, np.float64)
    totals_L2 = _sum_by_level(np.stack([values_N, np.ones_like(values_N)], -1), levels_N)
    return bootstrap(totals_L2, lambda total: total[0] / total[1])


def ratio_over_levels(numerator_N: ArrayLike, denominator_N: ArrayLike, levels_N: ArrayLike) -> Estimate:
    """The ratio of two sums (an error over its baseline), with its interval over levels."""
    pairs_N2 = np.stack([np.asarray(numerator_N, np.float64), np.asarray(denominator_N, np.float64)], -1)
    return bootstrap(_sum_by_level(pairs_N2, levels_N), lambda total: total[0] / max(total[1], 1e-12))


def flatten(estimates: Mapping[str, Estimate | float]) -> dict[str, float]:
    """The flat dict that a tracker takes: an Estimate becomes `name` and `name_ci95`."""
    flat: dict[str, float] = {}
    for name, estimate in estimates.items():
        if isinstance(estimate, Estimate):
            flat[name], flat[f"{name}_ci95"] = estimate
        else:
            flat[name] = float(estimate)
    return flat


# --- pictures ---


def mean_squared_error(truth: ArrayLike, prediction: ArrayLike) -> Floats:
    """Of frames (..., H, W, C), uint8 or in [0, 1]: (...) in squared units of [0, 1]."""
    difference = _unit(truth) - _unit(prediction)
    return np.asarray(np.square(difference).mean(axis=(-3, -2, -1)), np.float64)


def psnr(truth: ArrayLike, prediction: ArrayLike) -> Floats:
    """Peak signal-to-noise ratio in dB of each frame (..., H, W, C), uint8 or in [0, 1]; at most MAX_PSNR."""
    return np.asarray(-10 * np.log10(np.maximum(mean_squared_error(truth, prediction), 10 ** (-MAX_PSNR / 10))))


def ssim(truth: ArrayLike, prediction: ArrayLike) -> Floats:
    """Structural similarity (Wang et al., 2004) of frames (..., H, W, C), uint8 or in [0, 1]: 1 where equal."""
    from torchmetrics.functional.image import structural_similarity_index_measure  # a second that few need

    truth, prediction = np.asarray(truth), np.asarray(prediction)
    a_NHWC, b_NHWC = (x.reshape(-1, *x.shape[-3:]) for x in (truth, prediction))
    values = []
    for i in range(0, len(a_NHWC), 64):  # a few at a time: it makes five pictures of each
        a, b = (torch.from_numpy(_unit(x[i : i + 64])).movedim(-1, 1) for x in (a_NHWC, b_NHWC))
        similarity = structural_similarity_index_measure(a, b, reduction="none", data_range=1.0)
        assert isinstance(similarity, torch.Tensor)
        values.append(np.asarray(similarity, np.float64))
    return np.concatenate(values).reshape(truth.shape[:-3])


def pooled_psnr(errors_N: ArrayLike, levels_N: ArrayLike) -> Estimate:
    """PSNR in dB of the mean of squared errors, with its interval over levels.

    Where nothing moves, a copy is exact: the mean of PSNRs would then say how many clips stand still. This does not.
    """
    return pooled_psnr_gain(errors_N, np.ones(np.shape(errors_N)), levels_N)


def pooled_psnr_gain(errors_N: ArrayLike, baseline_N: ArrayLike, levels_N: ArrayLike) -> Estimate:
    """By how many dB the pooled PSNR is above that of a baseline's squared errors on the same samples."""
    pairs_N2 = np.stack([np.asarray(errors_N, np.float64), np.asarray(baseline_N, np.float64)], -1)
    floor = 10 ** (-MAX_PSNR / 10) * len(pairs_N2)
    return bootstrap(
        _sum_by_level(pairs_N2, levels_N),
        lambda total: float(10 * np.log10(max(total[1], floor) / max(total[0], floor))),
    )


def delta_psnr(truth: ArrayLike, inferred: ArrayLike, random: ArrayLike) -> Floats:
    """Controllability (section 3): how much closer to the truth the inferred actions lead than random ones, in dB."""
    return np.asarray(psnr(truth, inferred) - psnr(truth, random))


def screen_motion(before: ArrayLike, after: ArrayLike, reach: int = 8) -> Floats:
    """By how many pixels (down, right) what is on screen has moved: (N, 2), from frames (N, H, W, C).

    The shift of up to `reach` (and a quarter of the frame) that leaves the least squared error in the middle of the
    frame, and between whole pixels the lowest point of a parabola through its neighbours. Equal frames have not moved.
    """
    a_NHWC, b_NHWC = _unit(before), _unit(after)
    reach = min(reach, min(a_NHWC.shape[1:3]) // 4)
    middle = (slice(None), slice(reach, -reach), slice(reach, -reach))
    shifts = range(-reach, reach + 1)
    errors_NSS = np.stack(
        [
            np.stack(
                [np.square(np.roll(a_NHWC, (y, x), (1, 2))[middle] - b_NHWC[middle]).mean((1, 2, 3)) for x in shifts], 1
            )
            for y in shifts
        ],
        1,
    )
    errors_NSS[:, reach, reach] -= 1e-6
    best_N = errors_NSS.reshape(len(errors_NSS), -1).argmin(1)
    n, (y_N, x_N) = np.arange(len(best_N)), np.divmod(best_N, len(shifts))

    def refined(place_N: Ints, line_NS: Floats) -> Floats:
        inner_N = (place_N > 0) & (place_N < 2 * reach)
        at_N = np.clip(place_N, 1, 2 * reach - 1)
        low_N, mid_N, high_N = (line_NS[n, at_N + d] for d in (-1, 0, 1))
        bend_N = np.maximum(low_N - 2 * mid_N + high_N, 1e-9)
        between_N = np.where(inner_N, np.clip((low_N - high_N) / (2 * bend_N), -0.5, 0.5), 0)
        return np.asarray(place_N - reach + between_N, np.float64)

    moved_N2 = np.stack([refined(y_N, errors_NSS[n, :, x_N]), refined(x_N, errors_NSS[n, y_N])], 1)
    still_N = (y_N == reach) & (x_N == reach) & (errors_NSS[:, reach, reach] <= 0)
    return np.asarray(np.where(still_N[:, None], 0.0, moved_N2), np.float64)


# --- codes ---


def code_usage(codes: ArrayLike, num_codes: int, *, min_share: float = 0.0) -> float:
    """The share of the codebook in use: codes that make up more than `min_share` of all."""
    counts_K = np.bincount(_ints(codes), minlength=num_codes)
    return float(np.mean(counts_K > min_share * counts_K.sum()))


def code_perplexity(codes: ArrayLike, num_codes: int) -> float:
    """2 to the entropy of the codes' distribution: num_codes when all are used equally, 1 when one is used."""
    counts_K = np.bincount(_ints(codes), minlength=num_codes)
    return float(2 ** _entropy_bits(counts_K))


# --- latent actions beside true ones ---


def coinrun_buttons(actions: ArrayLike) -> Ints:
    """True actions 0..14 as the nine that differ in effect, the indices of COINRUN_KEYS."""
    actions_N = _ints(actions)
    return np.where(actions_N < len(COINRUN_KEYS), actions_N, COINRUN_KEYS.index("none"))


def coinrun_direction(actions: ArrayLike) -> Ints:
    """True actions 0..14 as the indices of DIRECTIONS."""
    return coinrun_buttons(actions) // 3


def majority_chance(truth_N: ArrayLike) -> float:
    """The accuracy of always saying the most frequent class."""
    return float(np.bincount(_ints(truth_N)).max() / np.size(truth_N))


def map_accuracy(latents_N: ArrayLike, truth_N: ArrayLike, levels_N: ArrayLike) -> Estimate:
    """How often the best latent -> class map is right; beside it, `majority_chance`. Cross-fitted by levels."""
    return accuracy(truth_N, _cross_fitted_classes(latents_N, truth_N, levels_N, balanced=False), levels_N)


def map_balanced_accuracy(latents_N: ArrayLike, truth_N: ArrayLike, levels_N: ArrayLike) -> Estimate:
    """The mean recall over classes of the latent -> class map best for it; chance is 1 / C. Cross-fitted by levels."""
    return balanced_accuracy(truth_N, _cross_fitted_classes(latents_N, truth_N, levels_N, balanced=True), levels_N)


def direction_confusion(latents_N: ArrayLike, directions_N: ArrayLike, levels_N: ArrayLike) -> Ints:
    """Counts (true, told) of DIRECTIONS: what `map_balanced_accuracy` is the mean recall of."""
    told_N = _cross_fitted_classes(latents_N, directions_N, levels_N, balanced=True)
    return contingency_table(directions_N, told_N, len(DIRECTIONS), len(DIRECTIONS))


def accuracy(truth_N: ArrayLike, predicted_N: ArrayLike, levels_N: ArrayLike) -> Estimate:
    return mean_over_levels(_ints(truth_N) == _ints(predicted_N), levels_N)


def balanced_accuracy(truth_N: ArrayLike, predicted_N: ArrayLike, levels_N: ArrayLike) -> Estimate:
    """The mean over true classes of their recall."""
    wrong_and_right_LC2 = _tables_by_level(truth_N, _ints(truth_N) == _ints(predicted_N), levels_N)

    def mean_recall(wrong_and_right_C2: Floats) -> float:
        present_C2 = wrong_and_right_C2[wrong_and_right_C2.sum(1) > 0]
        return float(np.mean(present_C2[:, 1] / present_C2.sum(1)))

    return bootstrap(wrong_and_right_LC2, mean_recall)


def mutual_information_bits(
    latents_N: ArrayLike, truth_N: ArrayLike, levels_N: ArrayLike, *, shifts: int = 20
) -> Estimate:
    """Mutual information of latents and true classes in bits, less its bias.

    The bias is the mean plug-in estimate when the truth is shifted against the latents by whole levels: unlike
    Miller-Madow's, it knows that neighbours in time are alike. Samples must lie in order of level and time.
    """
    truth_N = _ints(truth_N)
    level_starts = np.flatnonzero(np.diff(np.asarray(levels_N))) + 1
    if not len(level_starts):
        raise ValueError("mutual information needs at least 2 held-out levels; raise data.eval_levels")
    offsets = np.random.default_rng(0).permutation(level_starts)[:shifts]
    shifted = [_tables_by_level(latents_N, np.roll(truth_N, offset), levels_N).sum(0) for offset in offsets]
    bias = float(np.mean([_plug_in_information_bits(table_KC) for table_KC in shifted]))
    estimate = bootstrap(_tables_by_level(latents_N, truth_N, levels_N), _plug_in_information_bits)
    return Estimate(estimate.value - bias, estimate.ci95)


def explained_variance(latents_N: ArrayLike, truth_N: ArrayLike, levels_N: ArrayLike) -> Estimate:
    """The share of a continuous truth's variance that its mean given the latent explains; of vectors, of all axes'.

    Truths are (N) or (N, axes). Cross-fitted by levels: means from one half predict the other, so unrelated latents
    score about 0 (slightly below).
    """
    latents_N, truth_NX = _ints(latents_N), np.asarray(truth_N, np.float64).reshape(np.size(latents_N), -1)
    predicted_NX = np.empty_like(truth_NX)
    for fit_N in _halves(levels_N):
        is_latent_NK = latents_N[fit_N][:, None] == np.arange(latents_N.max() + 1)
        counts_K1 = is_latent_NK.sum(0)[:, None]
        mean_KX = is_latent_NK.T @ truth_NX[fit_N] / np.maximum(counts_K1, 1)
        mean_KX = np.where(counts_K1 > 0, mean_KX, truth_NX[fit_N].mean(0))
        predicted_NX[~fit_N] = mean_KX[latents_N[~fit_N]]
    centred_NX = truth_NX - truth_NX.mean(0)  # so that the squares below do not cancel
    squares_N3 = np.stack(
        [np.square(truth_NX - predicted_NX).sum(1), np.square(centred_NX).sum(1), np.ones(len(truth_NX))], -1
    )

    def explained(sums: Floats) -> float:
        variance = sums[1] - np.square(sums[3:]).sum() / sums[2]
        return float(1 - sums[0] / variance) if variance > 1e-12 else 0.0  # of nothing, nothing

    return bootstrap(_sum_by_level(np.concatenate([squares_N3, centred_NX], 1), levels_N), explained)


def displacement_codes(dx_N: ArrayLike, dy_N: ArrayLike, num_codes: int) -> Ints:
    """The codes of a quantizer that saw the true displacement itself: k-means of both axes, each of unit variance.

    One quantizer's result, not a bound: what latents may be expected to tell that name what moved on screen.
    """
    from sklearn.cluster import KMeans  # a second that few need

    moved_N2 = np.stack([np.asarray(dx_N, np.float64), np.asarray(dy_N, np.float64)], 1)
    moved_N2 /= moved_N2.std(0) + 1e-12
    clusters = min(num_codes, len(np.unique(moved_N2, axis=0)))
    return _ints(KMeans(clusters, n_init=4, random_state=0).fit_predict(moved_N2))


def latents_beside_truth(
    latents_N: ArrayLike, actions_N: ArrayLike, dx_N: ArrayLike, dy_N: ArrayLike, levels_N: ArrayLike, num_actions: int
) -> dict[str, float]:
    """What latent actions tell of the true ones (evaluation only).

    `latents_N[i]` and the true `actions_N[i]` lead between the same two frames, over which the agent moves by
    (`dx_N[i]`, `dy_N[i]`) world units. Samples lie in order of level and time.
    """
    buttons_N, direction_N = coinrun_buttons(actions_N), coinrun_direction(actions_N)
    return flatten(
        {
            "direction_balanced_accuracy": map_balanced_accuracy(latents_N, direction_N, levels_N),
            "direction_chance": 1 / len(DIRECTIONS),
            "direction_of_displacement": map_balanced_accuracy(
                displacement_codes(dx_N, dy_N, num_actions), direction_N, levels_N
            ),
            "action_accuracy": map_accuracy(latents_N, buttons_N, levels_N),
            "action_chance": majority_chance(buttons_N),
            "action_mutual_information_bits": mutual_information_bits(latents_N, buttons_N, levels_N),
            "displacement_x_explained": explained_variance(latents_N, dx_N, levels_N),
            "displacement_y_explained": explained_variance(latents_N, dy_N, levels_N),
        }
    )


def contingency_table(rows_N: ArrayLike, columns_N: ArrayLike, num_rows: int, num_columns: int) -> Ints:
    """Counts (num_rows, num_columns) of how often two codes meet."""
    cells_N = _ints(rows_N) * num_columns + _ints(columns_N)
    return np.bincount(cells_N, minlength=num_rows * num_columns).reshape(num_rows, num_columns)


# --- sets of videos ---


def frechet_distance(a_ND: ArrayLike, b_MD: ArrayLike) -> float:
    """Squared Frechet (2-Wasserstein) distance between Gaussians fitted to two sets of features.

    tr((S_a S_b)^1/2) is the nuclear norm of A B^T, where A and B are the centred features over sqrt(n - 1), or their
    triangular factors: no matrix root of a covariance, which fewer samples than features would leave singular.
    """
    a_ND, b_MD = np.asarray(a_ND, np.float64), np.asarray(b_MD, np.float64)
    if min(len(a_ND), len(b_MD)) < 2:
        raise ValueError("a Frechet distance needs at least 2 samples on both sides; raise evaluation.clips")
    mean_a_D, mean_b_D = a_ND.mean(0), b_MD.mean(0)
    root_a_ND, root_b_MD = (a_ND - mean_a_D) / np.sqrt(len(a_ND) - 1), (b_MD - mean_b_D) / np.sqrt(len(b_MD) - 1)
    factor_a, factor_b = (np.asarray(np.linalg.qr(root, mode="r"), np.float64) for root in (root_a_ND, root_b_MD))
    cross = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
    squared = np.square(mean_a_D - mean_b_D).sum() + np.square(root_a_ND).sum() + np.square(root_b_MD).sum() - 2 * cross
    return float(max(squared, 0.0))


def frechet_video_distance(real_BTHWC: ArrayLike, made_BTHWC: ArrayLike, features: VideoFeatures) -> float:
    """The Frechet distance between the features of real and made uint8 videos."""
    return frechet_distance(features(np.asarray(real_BTHWC)), features(np.asarray(made_BTHWC)))


# --- small parts ---


def _unit(frames: ArrayLike) -> NDArray[np.float32]:
    array = np.asarray(frames)
    return array.astype(np.float32) / 255 if array.dtype == np.uint8 else array.astype(np.float32)


def _ints(values: ArrayLike) -> Ints:
    return np.asarray(values).astype(np.int64).ravel()


def _halves(levels_N: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Every other level and the rest, as masks over the samples."""
    levels, index_N = np.unique(np.asarray(levels_N), return_inverse=True)
    if len(levels) < 2:
        raise ValueError("cross-fitting needs at least 2 held-out levels; raise data.eval_levels")
    first_N = index_N % 2 == 0
    return first_N, ~first_N


def _cross_fitted_classes(latents_N: ArrayLike, truth_N: ArrayLike, levels_N: ArrayLike, *, balanced: bool) -> Ints:
    """Each half of the levels classified by the best map of the other half, so that chance stays chance."""
    latents_N, truth_N = _ints(latents_N), _ints(truth_N)
    predicted_N = np.empty_like(truth_N)
    for fit_N in _halves(levels_N):
        table_KC = contingency_table(latents_N[fit_N], truth_N[fit_N], latents_N.max() + 1, truth_N.max() + 1)
        total_C = table_KC.sum(0)
        score_KC = table_KC / np.maximum(total_C, 1) if balanced else table_KC
        best_K = np.where(table_KC.any(1), score_KC.argmax(1), total_C.argmax())
        predicted_N[~fit_N] = best_K[latents_N[~fit_N]]
    return predicted_N


def _sum_by_level(values_NX: Floats, levels_N: ArrayLike) -> Floats:
    levels, index_N = np.unique(np.asarray(levels_N), return_inverse=True)
    totals_LX = np.zeros((len(levels), *values_NX.shape[1:]))
    np.add.at(totals_LX, index_N, values_NX)
    return totals_LX


def _tables_by_level(rows_N: ArrayLike, columns_N: ArrayLike, levels_N: ArrayLike) -> Floats:
    """A contingency table per level: (L, largest row + 1, largest column + 1)."""
    rows_N, columns_N = _ints(rows_N), _ints(columns_N)
    num_rows, num_columns = int(rows_N.max()) + 1, int(columns_N.max()) + 1
    levels, index_N = np.unique(np.asarray(levels_N), return_inverse=True)
    table = contingency_table(index_N * num_rows + rows_N, columns_N, len(levels) * num_rows, num_columns)
    return table.reshape(len(levels), num_rows, num_columns).astype(np.float64)


def _entropy_bits(counts: ArrayLike) -> float:
    counts = np.asarray(counts, np.float64).ravel()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def _plug_in_information_bits(table_KC: Floats) -> float:
    return _entropy_bits(table_KC.sum(1)) + _entropy_bits(table_KC.sum(0)) - _entropy_bits(table_KC)
