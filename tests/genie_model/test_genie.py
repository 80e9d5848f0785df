"""Play: cached equals uncached, chance comes from the seed alone, and bad actions are refused."""

import pytest
import torch
from torch import Tensor
from variants import VARIANTS

from genie_model.genie import NO_ACTION, Genie, PlayState
from genie_model.layers import TemporalCache
from genie_model.maskgit import _halton_rank, draw_chances, sample_frame
from genie_model.presets import get_preset

CONFIG = get_preset("tiny").with_overrides("sampling.maskgit_steps=3")


@pytest.fixture(scope="module")
def genie() -> Genie:
    torch.manual_seed(0)
    return Genie(CONFIG).eval()


@pytest.fixture
def frames() -> Tensor:
    return torch.randint(0, 256, (2, 3, 64, 64, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def play(genie: Genie, frames: Tensor, actions: list[list[int]], seed: int = 0) -> Tensor:
    state = genie.start(frames, seed)
    return torch.stack([genie.step(state, torch.tensor(a)) for a in actions])


def test_a_world_is_a_function_of_prompt_actions_and_seed(genie: Genie, frames: Tensor) -> None:
    actions = [[0, 1], [2, 3], [1, 1]]
    assert torch.equal(play(genie, frames, actions), play(genie, frames, actions))
    assert not torch.equal(play(genie, frames, actions), play(genie, frames, actions, seed=1))
    assert not torch.equal(play(genie, frames, actions)[-1], play(genie, frames, [[3, 0], [0, 2], [2, 3]])[-1])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prompt", range(1, 9))
def test_cached_equals_uncached_over_sixteen_frames(variant: str, prompt: int) -> None:
    """What the sampler reads of a masked frame, and the picture: from the past that is kept, and from a whole pass."""
    torch.manual_seed(0)
    genie = Genie(CONFIG.with_overrides(*VARIANTS[variant], "data.clip_length=16")).eval()
    dynamics, tokenizer = genie.dynamics, genie.tokenizer
    past, painted = TemporalCache(), TemporalCache()
    with torch.inference_mode():
        codes_BTNC = tokenizer.encode(torch.rand(3, 16, *genie.config.frame_shape))
        actions_BTL = torch.randn(3, 16, 32)
        codebook_VL = tokenizer.quantizer.codebook_VL
        pictures = [tokenizer.decode(codes_BTNC[:, :prompt], painted)]
        dynamics.remember(codes_BTNC[:, :prompt], actions_BTL[:, :prompt], codebook_VL, past)
        for t in range(prompt, 16):
            now, action = codes_BTNC[:, t : t + 1], actions_BTL[:, t : t + 1]
            masked = torch.where(torch.rand(now.shape) < 0.7, dynamics.mask_token, now)
            cached = dynamics.hidden(masked, action, codebook_VL, past)
            clip = torch.cat([codes_BTNC[:, :t], masked], 1)
            whole = dynamics.hidden(clip, actions_BTL[:, : t + 1], codebook_VL)[:, -1:]
            torch.testing.assert_close(cached, whole, atol=1e-5, rtol=1e-5)
            dynamics.remember(now, action, codebook_VL, past)
            pictures.append(tokenizer.decode(now, painted))
        torch.testing.assert_close(torch.cat(pictures, 1), tokenizer.decode(codes_BTNC), atol=1e-5, rtol=1e-5)


def test_the_streamed_picture_equals_decoding_the_whole_clip(genie: Genie, frames: Tensor) -> None:
    """Frames that play decoded one by one are those of one uncached pass over all tokens."""
    codes: list[Tensor] = []
    decode = genie.tokenizer.decode
    genie.tokenizer.decode = lambda c, cache=None: (codes.append(c), decode(c, cache))[1]  # type: ignore[method-assign]
    try:
        played = play(genie, frames, [[0, 1], [2, 3], [1, 1]])
    finally:
        del genie.tokenizer.decode
    with torch.inference_mode():
        whole = (genie.tokenizer.decode(torch.cat(codes, 1)) * 255).round()
    assert (played.transpose(0, 1).float() - whole[:, 3:]).abs().max() <= 1  # rounding


def test_the_sampler_reads_the_same_logits_with_and_without_a_cache(genie: Genie, frames: Tensor) -> None:
    with torch.inference_mode():
        codes = genie.tokenizer.encode(frames.float() / 255)
        actions = torch.randn(2, 3, 32)
        state = genie.start(frames)
        codebook = genie.tokenizer.quantizer.codebook_VL
        cached = genie.dynamics.hidden(codes[:, :1], actions[:, 2:], codebook, state.dynamics)
        inferred = torch.nn.functional.pad(genie.lam.quantizer.embed(genie.infer_actions(frames)), (0, 0, 1, 0))
        heard = torch.cat([inferred, actions[:, 2:]], 1)
        whole = genie.dynamics.hidden(torch.cat([codes, codes[:, :1]], 1), heard, codebook)
    torch.testing.assert_close(cached, whole[:, 3:], atol=1e-5, rtol=1e-4)


def test_play_continues_past_the_trained_clip_with_a_constant_past(genie: Genie, frames: Tensor) -> None:
    state = genie.start(frames[:, :1])
    for _ in range(CONFIG.data.clip_length + 3):
        frame = genie.step(state, torch.tensor([0, 1]))
    assert frame.shape == (2, 64, 64, 3)
    assert frame.dtype == torch.uint8
    assert all(k.shape[-2] == CONFIG.data.clip_length for k, _ in state.dynamics.rings.values())
    assert state.t == [CONFIG.data.clip_length + 4] * 2


def test_play_in_bfloat16_keeps_half_the_bytes_and_nearly_the_same_picture(frames: Tensor) -> None:
    torch.manual_seed(0)
    genie = Genie(CONFIG).eval()
    states = {}
    for precision in ("fp32", "bf16"):
        genie.config = CONFIG.with_overrides(f"sampling.precision={precision}")
        states[precision] = genie.start(frames)
        frame = genie.step(states[precision].fork(), torch.tensor([0, 1]))
        assert frame.dtype == torch.uint8
    for part in ("dynamics", "decoder"):
        exact, half = (getattr(states[precision], part).rings for precision in ("fp32", "bf16"))
        for layer, kept in exact.items():
            for full, rounded in zip(kept, half[layer], strict=True):
                assert rounded.dtype == torch.bfloat16
                assert (rounded - full).abs().mean() < 0.1 * full.abs().mean()  # some codes differ
    difference = states["bf16"].frame_BHWC.float() - states["fp32"].frame_BHWC.float()
    assert difference.abs().mean() < 2  # of 255


def test_a_fork_leaves_the_world_alone(genie: Genie, frames: Tensor) -> None:
    state = genie.start(frames)
    genie.step(state.fork(), torch.tensor([3, 3]))
    genie.step(state.repeat(2), torch.tensor([0, 1, 2, 3]))
    assert torch.equal(genie.step(state, torch.tensor([1, 2])), play(genie, frames, [[1, 2]])[0])


def test_a_preview_is_what_pressing_the_key_then_does(genie: Genie, frames: Tensor) -> None:
    state = genie.start(frames[:1])
    previews = genie.step(state.repeat(4), torch.arange(4))
    assert torch.equal(genie.step(state, torch.tensor([2])), previews[2:3])


def test_a_world_with_its_own_seed_is_the_same_alone_and_in_a_batch(genie: Genie, frames: Tensor) -> None:
    both, alone = genie.start(frames, seed=(5, 6)), genie.start(frames[1:], seed=6)
    for actions in ([0, 1], [2, 3]):
        together = genie.step(both, torch.tensor(actions))
        assert torch.equal(together[1:], genie.step(alone, torch.tensor(actions[1:])))
    with pytest.raises(ValueError, match="3 seeds for 2 worlds"):
        genie.start(frames, seed=(1, 2, 3))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("age", [0, 1, 7, 8, 30])
def test_a_world_is_resumed_from_the_tokens_and_actions_of_its_last_frames(
    frames: Tensor, age: int, precision: str
) -> None:
    torch.manual_seed(0)
    genie = Genie(CONFIG.with_overrides(f"sampling.precision={precision}")).eval()
    state, random = genie.start(frames[:, :1], seed=(5, 6)), torch.Generator().manual_seed(0)
    codes, actions = [state.codes_BNC], [torch.full((2,), NO_ACTION)]
    for _ in range(age):
        actions.append(torch.randint(CONFIG.num_actions, (2,), generator=random))
        genie.step(state, actions[-1])
        codes.append(state.codes_BNC)
    kept = slice(-genie.memory, None)
    resumed = genie.resume(torch.stack(codes, 1)[:, kept], torch.stack(actions, 1)[:, kept], (5, 6), state.t)
    for action in ([0, 3], [2, 1], [1, 1], [3, 0]):
        assert torch.equal(genie.step(resumed, torch.tensor(action)), genie.step(state, torch.tensor(action)))
        for of_resumed, of_state in ((resumed.dynamics, state.dynamics), (resumed.decoder, state.decoder)):
            assert of_resumed.positions == of_state.positions
    last = max(state.dynamics.rings)  # to the last bit, since both were computed alike: two worlds at once
    for found, expected in zip(resumed.dynamics.rings[last], state.dynamics.rings[last], strict=True):
        assert torch.equal(found, expected)
    assert resumed.t == state.t == [age + 5] * 2


def test_when_a_frame_becomes_past_makes_no_difference(genie: Genie, frames: Tensor) -> None:
    at_once, later = genie.start(frames, seed=(1, 2)), genie.start(frames, seed=(1, 2))
    for action in ([0, 3], [2, 1], [1, 1]):
        expected = genie.step(at_once, torch.tensor(action))
        genie.remember(at_once)
        genie.remember(at_once)
        assert torch.equal(genie.step(later, torch.tensor(action)), expected)
        later = later.take([0, 1])


def test_players_who_came_at_different_times_step_together(genie: Genie, frames: Tensor) -> None:
    first, second = genie.start(frames[:1], seed=1), genie.start(frames[1:], seed=2)
    for t in range(CONFIG.data.clip_length + 2):
        genie.step(first, torch.tensor([t % 4]))
    with pytest.raises(ValueError, match="remembered: call Genie"):
        PlayState.stack([first, second])
    genie.remember(first)
    together = PlayState.stack([first, second])
    found = genie.step(together, torch.tensor([3, 0]))
    assert torch.equal(found, torch.cat([genie.step(first, torch.tensor([3])), genie.step(second, torch.tensor([0]))]))
    assert together.t == first.t + second.t


def test_steps_may_be_sampled_otherwise_than_the_config_says(genie: Genie, frames: Tensor) -> None:
    state = genie.start(frames, seed=3)
    sharper = CONFIG.sampling.model_copy(update={"temperature": 0.0, "maskgit_steps": 1})
    expected = Genie(CONFIG.model_copy(update={"sampling": sharper})).eval()
    expected.load_state_dict(genie.state_dict())
    action = torch.tensor([0, 1])
    assert torch.equal(genie.step(state.fork(), action, sharper), expected.step(expected.start(frames, seed=3), action))
    assert not torch.equal(genie.step(state.fork(), action, sharper), genie.step(state, action))


@pytest.mark.parametrize("action", [-1, CONFIG.num_actions])
def test_an_action_out_of_range_is_refused(genie: Genie, frames: Tensor, action: int) -> None:
    with pytest.raises(ValueError, match=r"actions must be in 0\.\.3"):
        genie.step(genie.start(frames), torch.tensor([0, action]))


def sample(genie: Genie, frames: Tensor, seed: int = 0, **sampling: object) -> Tensor:
    """The codes of the frame after `frames`."""
    state, config = genie.start(frames), CONFIG.sampling.model_copy(update=sampling)
    codebook_VL = genie.tokenizer.quantizer.codebook_VL
    chances = draw_chances(config, (16, CONFIG.tokenizer.codes_per_patch), [torch.Generator().manual_seed(seed)])
    with torch.inference_mode():
        return sample_frame(genie.dynamics, config, state.dynamics, torch.zeros(2, 32), (4, 4), codebook_VL, chances)


@pytest.mark.parametrize("choice", ["draw", "mean"])
@pytest.mark.parametrize("order", ["confidence", "random", "halton"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_the_sampler_fills_every_token_in_any_number_of_steps(
    genie: Genie, frames: Tensor, steps: int, order: str, choice: str
) -> None:
    codes = sample(genie, frames, maskgit_steps=steps, choice=choice, order=order)
    assert codes.shape == (2, 1, 16, CONFIG.tokenizer.codes_per_patch)
    assert 0 <= int(codes.min()) <= int(codes.max()) < CONFIG.tokenizer.codebook.num_codes


@pytest.mark.parametrize("certain", [{"temperature": 0.0}, {"choice": "mean"}])
def test_what_is_not_drawn_is_certain(genie: Genie, frames: Tensor, certain: dict[str, object]) -> None:
    assert torch.equal(*(sample(genie, frames, seed, **certain, order_noise=0.0) for seed in (0, 1)))
    assert not torch.equal(*(sample(genie, frames, seed) for seed in (0, 1)))


def test_the_mean_s_code_errs_least_and_the_surest_come_first(frames: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all codes, it has the least expected squared distance to the one that is drawn; codes differ in length."""
    torch.manual_seed(0)
    genie = Genie(CONFIG).eval()
    codebook_VL = genie.tokenizer.quantizer.codebook_VL
    codebook_VL *= torch.linspace(0.5, 1.5, len(codebook_VL))[:, None]
    genie.dynamics.logits_out.weight.data *= 20  # so that it is sure of some tokens
    seen: list[Tensor] = []
    looked: list[Tensor] = []
    logits = genie.dynamics.logits
    monkeypatch.setattr(genie.dynamics, "logits", lambda *args: (seen.append(logits(*args)), seen[-1])[1])
    genie.dynamics.token_in.register_forward_hook(lambda module, args, output: looked.append(args[0]))
    codes_BNC = sample(genie, frames, maskgit_steps=1, choice="mean", temperature=1.0)[:, 0]
    probs_BNCV = seen[-1].view(*codes_BNC.shape, -1).softmax(-1)
    error_BNCV = probs_BNCV @ torch.cdist(codebook_VL, codebook_VL).square()
    assert torch.equal(codes_BNC, error_BNCV.argmin(-1))

    sample(genie, frames, maskgit_steps=2, choice="mean", temperature=1.0, order_noise=0.0)
    masked_BNC = (looked[-1] - genie.dynamics.slot_C)[:, 0] == genie.dynamics.mask_token  # what the second step sees
    for masked_NC, error_NC in zip(masked_BNC, error_BNCV.amin(-1), strict=True):
        assert masked_NC.any()
        assert error_NC[~masked_NC].max() <= error_NC[masked_NC].min() + 1e-4


def test_halton_s_order_spreads_over_the_frame_and_is_the_same_each_time() -> None:
    rank = _halton_rank(8, 8, torch.device("cpu")).view(8, 8)
    assert sorted(rank.flatten().tolist()) == list(range(64))
    first = torch.nonzero(rank < 6).float()
    assert torch.cdist(first, first).fill_diagonal_(9).min() > 1  # no two of the first six share an edge
    assert _halton_rank(3, 5, torch.device("cpu")).shape == (15,)


def test_the_temperature_goes_from_the_first_to_the_last(genie: Genie, frames: Tensor) -> None:
    """At 0 nothing is drawn, so that chance, the seed, tells whether a step was warm."""
    base = {"choice": "draw", "order": "halton", "maskgit_steps": 2}

    def chance(steps: int, first: float, last: float) -> bool:
        settings = base | {"maskgit_steps": steps, "temperature": first, "last_temperature": last}
        return not torch.equal(*(sample(genie, frames, seed, **settings) for seed in (0, 1)))

    assert not chance(2, 0.0, 0.0)
    assert chance(2, 0.0, 3.0)
    assert chance(2, 3.0, 0.0)
    assert not chance(1, 0.0, 3.0)  # one step is the first


@pytest.mark.parametrize("order", ["random", "halton"])
def test_which_tokens_come_first_is_the_order_s(frames: Tensor, order: str) -> None:
    """After the first of two steps those are known whose turn it is, however sure of others the model may be."""
    torch.manual_seed(0)
    genie = Genie(CONFIG).eval()
    genie.dynamics.logits_out.weight.data *= 20
    looked: list[Tensor] = []
    genie.dynamics.token_in.register_forward_hook(lambda module, args, output: looked.append(args[0]))
    known = []
    for seed in (0, 1):
        sample(genie, frames, seed, maskgit_steps=2, order=order, order_noise=0.0, temperature=0.0)
        known.append((looked[-1] - genie.dynamics.slot_C)[0, 0] != genie.dynamics.mask_token)
    if order == "random":
        assert not torch.equal(*known)
    else:
        first = _halton_rank(4, 4, torch.device("cpu")) < known[0].any(-1).sum()
        assert torch.equal(known[0].any(-1), first)
        assert torch.equal(*known)


def test_temperature_zero_takes_the_likeliest_code_either_way(genie: Genie, frames: Tensor) -> None:
    certain = {"temperature": 0.0, "order_noise": 0.0, "maskgit_steps": 1}
    assert torch.equal(sample(genie, frames, **certain), sample(genie, frames, **certain, choice="mean"))
