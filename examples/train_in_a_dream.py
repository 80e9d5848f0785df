"""Trains a small policy inside a dream: to go right, which is to make the picture scroll to the left.

    python examples/train_in_a_dream.py MODEL_FOLDER

The reward is read off the frames: by how many pixels the picture moved. An episode begins at one of the model's start
frames, after a few random actions. In the end the trained policy, a random one and all that hold a single action play
the same held-out seeds.

What this shows: a policy that never saw the game learns, in minutes, what moves a dreamt picture. Not that it is any
good in the game: it may live on the dream's flaws. And only seeds are held out, in the intervals too: a model brings
few start frames, and training saw them all; the random actions before an episode are other ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from genie_model.progress import bar

HELD_OUT = 1_000_000  # seeds from here on are not trained on
HELD = 2  # frames that an action is held for
WARM_UP = 2  # random actions before an episode
SEEN = 3  # frames that the policy sees, small and gray
Chooser = Callable[[Tensor], Tensor]  # what is seen (B, SEEN, 16, 16) -> actions (B)


def gray(frames_BHWC: np.ndarray, size: int) -> Tensor:
    """(B, size, size), in [0, 1]."""
    return nn.functional.adaptive_avg_pool2d(torch.from_numpy(frames_BHWC).float().mean(-1) / 255, size)


def scrolled(before_BHWC: np.ndarray, action_B: np.ndarray, frames_BHWC: np.ndarray) -> np.ndarray:
    """Pixels (B) to the left, of the one shift that explains best how the frame changed (Lucas and Kanade, 1981)."""
    before, after = gray(before_BHWC, 32).numpy(), gray(frames_BHWC, 32).numpy()
    y, x = np.gradient((before + after) / 2, axis=(1, 2))
    flat = 1e-2  # a picture of one colour does not move
    yy, xx, xy = (y * y).sum((1, 2)) + flat, (x * x).sum((1, 2)) + flat, (x * y).sum((1, 2))
    xt, yt = (x * (after - before)).sum((1, 2)), (y * (after - before)).sum((1, 2))
    return np.clip(before_BHWC.shape[2] / 32 * (yy * xt - xy * yt) / (yy * xx - xy * xy), -4, 4)  # a flash is no motion


class Policy(nn.Module):
    """Chances of the actions, and the value (B) of what is seen (B, SEEN, 16, 16)."""

    def __init__(self, num_actions: int) -> None:
        super().__init__()
        convolutions = nn.Conv2d(SEEN, 32, 4, 2), nn.ReLU(), nn.Conv2d(32, 32, 3, 2), nn.ReLU(), nn.Flatten()
        self.body = nn.Sequential(*convolutions, nn.Linear(288, 128), nn.ReLU())
        self.action, self.value = nn.Linear(128, num_actions), nn.Linear(128, 1)

    def forward(self, seen: Tensor) -> tuple[Categorical, Tensor]:
        x = self.body(seen - 0.5)
        return Categorical(logits=self.action(x)), self.value(x)[:, 0]


@torch.no_grad()
def play(env: gymnasium.vector.VectorEnv, choose: Chooser, seed: int, steps: int) -> tuple[Tensor, ...]:
    """An episode of each world: what was seen (T, B, SEEN, 16, 16), actions (T, B), rewards (T, B) of T decisions."""
    frames_BHWC, _ = env.reset(seed=seed)
    random, episode, last = np.random.default_rng(seed), [], [gray(frames_BHWC, 16)] * SEEN
    for t in range(-WARM_UP, steps // HELD):
        seen = torch.stack(last, 1)
        drawn = torch.from_numpy(random.integers(env.single_action_space.n, size=env.num_envs))
        action, reward = drawn if t < 0 else choose(seen), torch.zeros(env.num_envs)
        for _ in range(HELD):
            frames_BHWC, rewards_B, *_ = env.step(action.numpy())
            reward += torch.from_numpy(rewards_B)
            last = [*last[1:], gray(frames_BHWC, 16)]
        episode.append((seen, action, reward))
    return tuple(torch.stack(part) for part in zip(*episode[WARM_UP:], strict=True))


def learn(policy: Policy, optimizer: torch.optim.Optimizer, seen: Tensor, action: Tensor, reward: Tensor) -> None:
    """Proximal policy optimization (Schulman et al., 2017) on one batch of episodes."""
    (T, B), seen, action = action.shape, seen.flatten(0, 1), action.flatten()
    with torch.no_grad():
        chances, value = policy(seen)
        before, value = chances.log_prob(action), torch.cat([value.view(T, B), torch.zeros(1, B)])
        gain = torch.zeros(T + 1, B)  # over what was expected
        for t in reversed(range(T)):
            gain[t] = reward[t] + 0.95 * value[t + 1] - value[t] + 0.95 * 0.9 * gain[t + 1]
        earned, gain = (gain + value)[:T].flatten(), gain[:T].flatten()
        gain = (gain - gain.mean()) / (gain.std() + 1e-6)
    for part in (part for _ in range(4) for part in torch.randperm(T * B).chunk(4)):
        chances, value = policy(seen[part])
        ratio = (chances.log_prob(action[part]) - before[part]).exp()
        better = torch.min(ratio * gain[part], ratio.clamp(0.8, 1.2) * gain[part]).mean()
        loss = 0.5 * (value - earned[part]).square().mean() - better - 0.01 * chances.entropy().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
        optimizer.step()


def interval(values: Tensor) -> str:
    """Mean and 95% interval."""
    return f"{values.mean():6.2f} ± {1.96 * values.std() / len(values) ** 0.5:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder with config.json, model.safetensors and start_frames/")
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--worlds", type=int, default=16, help="side by side: the episodes of an update")
    parser.add_argument("--steps", type=int, default=32, help=f"frames of an episode, {HELD} for each action")
    parser.add_argument("--episodes", type=int, default=64, help="held-out ones, of every policy")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    dream = {"id": "genie_model.env:Genie-v0", "model_uri": options.model, "reward": scrolled, "max_steps": None}
    try:
        env = gymnasium.make_vec(num_envs=options.worlds, **dream)
    except ValueError as error:
        parser.error(str(error))
    num_actions = int(env.single_action_space.n)
    policy = Policy(num_actions)
    optimizer = torch.optim.Adam(policy.parameters(), 1e-3)

    def trained(seen: Tensor) -> Tensor:
        return policy(seen)[0].sample()

    updates = bar(range(options.updates), desc="train in a dream", unit="update")
    for update in updates:
        seed = (options.seed * options.updates + update) * options.worlds % (HELD_OUT - options.worlds)
        seen, action, reward = play(env, trained, seed, options.steps)
        learn(policy, optimizer, seen, action, reward)
        updates.set_postfix_str(f"reward {reward.sum(0).mean():.2f}", refresh=False)
    rivals: dict[str, Chooser] = {"trained": trained, "random": lambda seen: torch.randint(num_actions, seen.shape[:1])}
    for a in range(num_actions):
        rivals[f"always {a}"] = lambda seen, a=a: torch.full(seen.shape[:1], a)
    earned, env = {}, gymnasium.make_vec(num_envs=options.episodes, **dream)
    for name, choose in bar(rivals.items(), desc="held-out episodes", unit="policy"):
        earned[name] = play(env, choose, HELD_OUT, options.steps)[2].sum(0)
    best = max(list(earned)[2:], key=lambda name: earned[name].mean().item())
    print(f"pixels scrolled in {options.steps} frames, mean of {options.episodes} held-out episodes and 95% interval:")
    for name, found in earned.items():
        print(f"  {name:10}{interval(found)}")
    print(f"  trained over {best}, the best, from the same beginnings: {interval(earned['trained'] - earned[best])}")


if __name__ == "__main__":
    main()
