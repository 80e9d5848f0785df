"""The policy sees no future, learns what can be seen and nothing else, and plays as it was trained."""

import numpy as np
import pytest
import torch

from genie_model.data.coinrun import NUM_ACTIONS
from genie_model.optim import Optimizers
from genie_model.policy import Player, Policy
from genie_model.presets import get_preset

CONFIG = get_preset("tiny").with_overrides("train_policy.precision=fp32")
CONTEXT = CONFIG.policy.context


@pytest.fixture
def policy() -> Policy:
    torch.manual_seed(0)
    return Policy(CONFIG, NUM_ACTIONS).eval()


def clips(batch: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_BTHWC = torch.rand((batch, CONTEXT, *CONFIG.frame_shape), generator=generator)
    return x_BTHWC, torch.randint(NUM_ACTIONS, (batch, CONTEXT), generator=generator)


def coloured(actions_BT: torch.Tensor) -> torch.Tensor:
    """Clips whose frames are as bright as their action is large: it can be seen."""
    return (actions_BT / NUM_ACTIONS)[..., None, None, None].expand(*actions_BT.shape, *CONFIG.frame_shape)


def trained(x_BTHWC: torch.Tensor, actions_BT: torch.Tensor, steps: int) -> dict[str, float]:
    torch.manual_seed(0)
    policy = Policy(CONFIG, NUM_ACTIONS)
    optimizers = Optimizers(policy, CONFIG.train_policy.optimizer)
    for _ in range(steps):
        loss, logs = policy(x_BTHWC, actions_BT)
        loss.backward()
        optimizers.step()
    return {name: float(value) for name, value in logs.items()}


@pytest.mark.parametrize("t", range(1, CONTEXT))
def test_a_later_frame_and_its_action_change_no_earlier_logits(policy: Policy, t: int) -> None:
    x_BTHWC, actions_BT = clips(2)
    before = policy.logits(x_BTHWC, actions_BT[:, :-1])
    x_BTHWC[:, t:] = 1 - x_BTHWC[:, t:]
    actions_BT[:, t - 1 :] = (actions_BT[:, t - 1 :] + 1) % NUM_ACTIONS
    after = policy.logits(x_BTHWC, actions_BT[:, :-1])
    assert torch.equal(before[:, :t], after[:, :t])
    assert (before[:, t] != after[:, t]).all()


def test_the_action_that_led_to_a_frame_and_those_before_are_seen(policy: Policy) -> None:
    x_BTHWC, actions_BT = clips(1)
    before = policy.logits(x_BTHWC, actions_BT[:, :-1])
    actions_BT[:, 1] = (actions_BT[:, 1] + 1) % NUM_ACTIONS  # it leads to frame 2
    changed_T = (policy.logits(x_BTHWC, actions_BT[:, :-1]) != before).any(-1)[0]
    assert changed_T.tolist() == [False, False, True, True]


def test_every_parameter_gets_a_gradient(policy: Policy) -> None:
    loss, _ = policy(*clips(2))
    loss.backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_handful_of_transitions_is_learnt_by_heart() -> None:
    x_BTHWC, actions_BT = clips(3)
    assert trained(x_BTHWC, actions_BT, 120)["accuracy"] == 1


def test_what_can_be_seen_is_learnt_and_a_frame_s_own_action_is_not_leaked() -> None:
    actions_BT = clips(32)[1] % 4
    seen = trained(coloured(4 * actions_BT), actions_BT, 40)
    blind = trained(coloured(torch.zeros_like(actions_BT)), actions_BT, 40)
    assert seen["accuracy"] > 0.9
    assert blind["accuracy"] < 0.5, "actions are drawn independently: there is nothing to know"


def test_play_sees_what_training_sees(policy: Policy) -> None:
    """At every step the last frames, with the actions between them: the first of the sequence has none."""
    steps, levels = CONTEXT + 3, 3
    frames_TBHWC = np.random.default_rng(0).integers(0, 256, (steps, levels, *CONFIG.frame_shape), np.uint8)
    shown: list[torch.Tensor] = []
    player, logits = Player(policy, seed=0), policy.logits
    policy.logits = lambda x, previous: shown.append(logits(x, previous)) or shown[-1]  # type: ignore[method-assign]
    action_TB = np.stack([player(frames_BHWC, np.zeros(levels, bool)) for frames_BHWC in frames_TBHWC])
    for t in range(steps):
        first = max(t - CONTEXT + 1, 0)
        clip_BTHWC = torch.from_numpy(frames_TBHWC[first : t + 1]).movedim(1, 0).float() / 255
        actions_BT = torch.from_numpy(action_TB[first : t + 1]).T
        in_training = logits(clip_BTHWC, actions_BT[:, :-1])  # as `forward` calls it
        assert torch.allclose(shown[t], in_training, atol=1e-5), t


def test_a_level_does_not_hang_on_those_that_are_over(policy: Policy) -> None:
    frames_TBHWC = np.random.default_rng(0).integers(0, 256, (6, 3, *CONFIG.frame_shape), np.uint8)
    done_TB = np.zeros((6, 3), bool)
    done_TB[2:, 1] = True
    alone, beside = Player(policy, 5, random_share=0.3), Player(policy, 5, random_share=0.3)
    for frames_BHWC, done_B in zip(frames_TBHWC, done_TB, strict=True):
        every = alone(frames_BHWC, np.zeros(3, bool))
        assert (beside(frames_BHWC, done_B) == every)[~done_B].all()


def test_actions_are_sampled_from_the_logits(policy: Policy) -> None:
    torch.nn.init.zeros_(policy.logits_out.weight)
    share_A = torch.arange(1.0, NUM_ACTIONS + 1).softmax(0)
    policy.logits_out.bias.data = share_A.log()
    drawn = Player(policy, seed=0)(np.zeros((4000, *CONFIG.frame_shape), np.uint8), np.zeros(4000, bool))
    assert np.abs(np.bincount(drawn, minlength=NUM_ACTIONS) / 4000 - share_A.numpy()).max() < 0.03


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_a_share_of_the_steps_is_random(policy: Policy, share: float) -> None:
    torch.nn.init.zeros_(policy.logits_out.weight)
    policy.logits_out.bias.data = torch.where(torch.arange(NUM_ACTIONS) == 7, 100.0, 0.0)  # always 7
    player = Player(policy, seed=0, random_share=share)
    drawn = player(np.zeros((3000, *CONFIG.frame_shape), np.uint8), np.zeros(3000, bool))
    others = np.delete(np.bincount(drawn, minlength=NUM_ACTIONS) / 3000, 7)
    assert np.abs(others - share / NUM_ACTIONS).max() < 0.02
    assert np.ptp(others) < 0.03
