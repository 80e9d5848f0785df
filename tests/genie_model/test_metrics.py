"""Every metric has known values, and reads chance as chance."""

import numpy as np
import pytest

from genie_model import metrics

LEVELS, STEPS = 40, 100


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def levels():
    return np.repeat(np.arange(LEVELS), STEPS)


def test_psnr_known_values():
    black, grey = np.zeros((2, 8, 8, 3), np.uint8), np.full((2, 8, 8, 3), 51, np.uint8)  # 51 / 255 = 0.2
    np.testing.assert_allclose(metrics.psnr(black, grey), [13.979, 13.979], atol=1e-3)
    np.testing.assert_allclose(metrics.psnr(black, np.full((2, 8, 8, 3), 0.1, np.float32)), [20, 20], atol=1e-4)
    np.testing.assert_array_equal(metrics.psnr(grey, grey), [metrics.MAX_PSNR] * 2)


def test_ssim_falls_with_noise_and_less_with_brightness_than_psnr_does(rng):
    frames = rng.integers(0, 256, (2, 3, 8, 8, 3)).repeat(4, axis=2).repeat(4, axis=3).astype(np.uint8)
    noisy = [(frames + s * rng.normal(size=frames.shape)).clip(0, 255).astype(np.uint8) for s in (0, 10, 30)]
    equal, some, much = (metrics.ssim(frames, x) for x in noisy)
    np.testing.assert_allclose(equal, np.ones((2, 3)), atol=1e-6)
    assert (equal > some).all()
    assert (some > much).all()
    brighter = np.minimum(frames.astype(int) // 2 + 64, 255), frames // 2
    assert (metrics.psnr(*(x.astype(np.uint8) for x in brighter)) < 13).all()
    assert (metrics.ssim(*(x.astype(np.uint8) for x in brighter)) > 0.5).all()


@pytest.mark.parametrize(("down", "right"), [(0, 0), (3, -2), (-7, 5)])
def test_screen_motion_finds_whole_and_half_pixels(rng, down, right):
    world = rng.integers(0, 256, (4, 20, 20, 3)).repeat(5, axis=1).repeat(5, axis=2).astype(np.float32) / 255

    def at(y, x):
        return world[:, 20 - y : 84 - y, 20 - x : 84 - x]

    moved = metrics.screen_motion(at(0, 0), at(down, right))
    np.testing.assert_allclose(moved, [[down, right]] * 4, atol=0.05)
    half = (at(down, right) + at(down, right + 1)) / 2
    np.testing.assert_allclose(metrics.screen_motion(at(0, 0), half), [[down, right + 0.5]] * 4, atol=0.15)


def test_nothing_moves_on_an_empty_or_a_still_screen():
    grey = np.full((2, 64, 64, 3), 77, np.uint8)
    np.testing.assert_array_equal(metrics.screen_motion(grey, grey), np.zeros((2, 2)))
    small = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(metrics.screen_motion(small, small), np.zeros((2, 2)))
    np.testing.assert_array_equal(metrics.screen_motion(small, np.roll(small, 1, 2)).round(), [[0, 1]] * 2)


def test_the_explained_variance_of_vectors_is_of_all_axes(rng, levels):
    latents = rng.integers(0, 2, levels.size)
    told, untold = 2.0 * latents, rng.normal(size=levels.size)
    estimate = metrics.explained_variance(latents, np.stack([told, untold], 1), levels)
    assert estimate.value == pytest.approx(0.5, abs=0.03)


def test_pooled_psnr_is_of_the_mean_error_and_does_not_count_still_clips():
    copy, dreamt, levels = [0.0, 0.02], [0.001, 0.001], [0, 1]  # a copy is exact where nothing moves
    assert metrics.pooled_psnr(copy, levels).value == pytest.approx(20)
    assert metrics.pooled_psnr(dreamt, levels) == pytest.approx((30, 0))
    assert metrics.pooled_psnr_gain(dreamt, copy, levels).value == pytest.approx(10)
    assert metrics.pooled_psnr([0.0, 0.0], levels).value == metrics.MAX_PSNR


def test_delta_psnr_is_zero_when_actions_are_ignored_and_positive_when_they_help(rng):
    truth = rng.integers(0, 256, (3, 4, 8, 8, 3), dtype=np.uint8)
    ignored = rng.integers(0, 256, truth.shape, dtype=np.uint8)
    np.testing.assert_array_equal(metrics.delta_psnr(truth, ignored, ignored), np.zeros((3, 4)))
    near = (truth * 0.9).astype(np.uint8)
    assert (metrics.delta_psnr(truth, near, ignored) > 5).all()


def test_code_usage_and_perplexity():
    assert metrics.code_usage([0, 0, 1, 3], 8) == 3 / 8
    assert metrics.code_usage([0] * 999 + [1], 2, min_share=0.01) == 1 / 2
    assert metrics.code_perplexity(np.arange(6), 6) == pytest.approx(6)
    assert metrics.code_perplexity([2, 2, 2], 6) == pytest.approx(1)


def test_intervals_cover_the_truth_and_count_levels_not_frames(rng):
    covered = 0
    for _ in range(200):
        level_means = rng.normal(size=LEVELS)
        estimate = metrics.mean_over_levels(np.repeat(level_means, 20), np.repeat(np.arange(LEVELS), 20))
        assert estimate.value == pytest.approx(level_means.mean())
        covered += abs(estimate.value) < estimate.ci95
    assert 175 <= covered <= 198  # 95% of 200, give or take; frames as the sample would cover about 70


def test_ratio_is_of_sums():
    assert metrics.ratio_over_levels([1.0, 3.0], [2.0, 6.0], [0, 1]) == pytest.approx((0.5, 0))


def test_true_actions_by_what_they_do():
    np.testing.assert_array_equal(metrics.coinrun_direction(range(15)), [0] * 3 + [1] * 3 + [2] * 3 + [1] * 6)
    np.testing.assert_array_equal(metrics.coinrun_buttons(range(15)), [*range(9), *[4] * 6])


@pytest.mark.parametrize("codes", [6, 200])
def test_unrelated_latents_score_chance_even_with_many_codes(rng, levels, codes):
    actions = rng.integers(0, 15, levels.size)
    move = rng.normal(size=levels.size)
    read = metrics.latents_beside_truth(rng.integers(0, codes, levels.size), actions, move, move, levels, codes)
    assert read["direction_balanced_accuracy"] == pytest.approx(read["direction_chance"], abs=0.03)
    assert read["action_accuracy"] < read["action_chance"] + 0.02
    assert abs(read["action_mutual_information_bits"]) < 0.02
    assert -0.2 < read["displacement_x_explained"] < 0.01


def test_perfect_latents_score_one(rng, levels):
    actions = rng.integers(0, 15, levels.size)
    buttons = metrics.coinrun_buttons(actions)
    latents = rng.permutation(9)[buttons]  # the names of the codes do not matter
    dx, dy = metrics.coinrun_direction(actions) - 1.0, buttons % 3 - 1.0
    read = metrics.latents_beside_truth(latents, actions, dx, dy, levels, 9)
    assert read["direction_balanced_accuracy"] == read["direction_of_displacement"] == 1
    assert read["action_accuracy"] == 1
    assert read["displacement_x_explained"] == pytest.approx(1)
    assert read["displacement_y_explained"] == pytest.approx(1)
    assert read["action_accuracy_ci95"] == 0


def test_codes_of_the_true_displacement_know_its_clusters_on_any_scale(rng):
    dx, dy = rng.integers(0, 3, 300), rng.integers(0, 2, 300)
    codes = metrics.displacement_codes(dx * 1e-3, dy * 50.0, 6)
    assert len(np.unique(codes)) == len({*zip(codes, dx, dy, strict=True)}) == 6
    assert len(np.unique(metrics.displacement_codes(np.zeros(10), np.zeros(10), 6))) == 1


def test_a_latent_of_one_axis_explains_that_axis_only(rng, levels):
    dx, dy = rng.normal(size=(2, levels.size))
    latents = np.digitize(dy, [-1.5, -0.5, 0.5, 1.5])
    assert metrics.explained_variance(latents, dy, levels).value > 0.85
    assert abs(metrics.explained_variance(latents, dx, levels).value) < 0.02


def test_explained_variance_known_value(rng, levels):
    latents = rng.integers(0, 2, levels.size)
    noisy = 100 + 2 * latents + rng.normal(size=levels.size)  # variance 1 between the codes, 1 within
    estimate = metrics.explained_variance(latents, noisy, levels)
    assert estimate.value == pytest.approx(0.5, abs=0.03)
    assert 0.005 < estimate.ci95 < 0.05


def test_map_accuracy_counts_errors(rng, levels):
    truth = rng.integers(0, 3, levels.size)
    latents = np.where(rng.random(levels.size) < 0.4, rng.integers(0, 3, levels.size), truth)
    assert metrics.map_accuracy(latents, truth, levels).value == pytest.approx(0.6 + 0.4 / 3, abs=0.03)


def test_a_collapsed_latent_is_chance_however_unbalanced_the_classes(rng, levels):
    truth = (rng.random(levels.size) < 0.1).astype(int)
    latents = np.zeros(levels.size, int)
    assert metrics.map_balanced_accuracy(latents, truth, levels).value == 0.5
    assert metrics.map_accuracy(latents, truth, levels).value == pytest.approx(metrics.majority_chance(truth))


def test_mutual_information_known_values(rng, levels):
    truth = rng.integers(0, 4, levels.size)
    assert metrics.mutual_information_bits(truth, truth, levels).value == pytest.approx(2, abs=0.02)
    assert metrics.mutual_information_bits(truth // 2, truth, levels).value == pytest.approx(1, abs=0.02)
    assert metrics.mutual_information_bits(truth // 2, truth % 2, levels).value == pytest.approx(0, abs=0.005)


def test_mutual_information_bias_knows_that_neighbours_are_alike(rng, levels):
    """Unrelated but slow latents and actions: a correction that takes samples as independent would see information."""
    excess = []
    for _ in range(10):
        latents, truth = (np.repeat(rng.integers(0, 6, levels.size // 50), 50) for _ in range(2))
        excess.append(metrics.mutual_information_bits(latents, truth, levels).value)
    assert abs(np.mean(excess)) < 0.05


def test_frechet_distance_of_known_gaussians(rng):
    a = rng.normal(size=(40_000, 2)) * [1, 2]
    b = rng.normal(size=(40_000, 2)) * [3, 1] + [3, 4]
    assert metrics.frechet_distance(a, b) == pytest.approx(25 + 4 + 1, rel=0.02)  # |mean|^2 + sum (s_a - s_b)^2
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_agrees_with_the_matrix_root(rng):
    scipy_linalg = pytest.importorskip("scipy.linalg")
    mix_a, mix_b = rng.normal(size=(2, 5, 5))
    a, b = rng.normal(size=(60, 5)) @ mix_a, rng.normal(size=(50, 5)) @ mix_b + 1
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = scipy_linalg.sqrtm(cov_a @ cov_b).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_is_sound_with_fewer_samples_than_features(rng):
    a = rng.normal(size=(8, 500))
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert np.isfinite(metrics.frechet_distance(a, a[:5]))


def test_bad_input_says_what_to_do(rng):
    with pytest.raises(ValueError, match=r"raise data\.eval_levels"):
        metrics.explained_variance([0, 1], [0.0, 1.0], [7, 7])
    with pytest.raises(ValueError, match=r"raise evaluation\.clips"):
        metrics.frechet_distance(np.zeros((1, 3)), np.zeros((4, 3)))
