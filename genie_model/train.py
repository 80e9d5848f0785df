"""The one trainer. A model's `forward` takes clips in [0, 1], maybe codes or actions, and chance: (loss, logs).

A step is a pure function of (config, data, step): the batch, the learning rate and the random numbers all derive from
the step's number. So a run that was killed and started again ends in the very weights of one that was not.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn

from genie_model import checkpoint, files
from genie_model.backend.seam import Backend, training
from genie_model.chance import Chance
from genie_model.config import Config, StageConfig
from genie_model.data.loader import ClipLoader
from genie_model.data.store import VideoStore
from genie_model.genie import Genie
from genie_model.optim import learning_rate_share
from genie_model.preemption import Preempted, preemption
from genie_model.progress import NoLog, RunLog, bar, speaks, summary
from genie_model.source import code_digest
from genie_model.tokens import tokens_of
from genie_model.training_state import TrainingState
from genie_model.watch import Watch

# The code that decides the weights of each model.
TRAINER_CODE = (
    "backend/capture.py",
    "backend/seam.py",
    "backend/native.py",
    "backend/processes.py",
    "backend/sharding.py",
    "backend/xla.py",
    "chance.py",
    "collectives.py",
    "data/codecs.py",
    "data/loader.py",
    "data/store.py",
    "layers.py",
    "optim.py",
    "train.py",
)
_TOKENIZER_CODE = (*TRAINER_CODE, "quantizer.py", "tokenizer.py")
_GENIE_CODE = (*_TOKENIZER_CODE, "dynamics.py", "genie.py", "lam.py", "tokens.py")
_SIZE = "data.frame_width and data.frame_height say"
_WATCHING = ("log_every", "checkpoint_every", "stall_seconds")  # how often training is looked at, not what it ends in


def train_tokenizer(
    config: Config, data_uri: str, root_uri: str, log: RunLog | None = None, only_find: bool = False
) -> str:
    """Phase one of section 2.1. Returns the URI of the tokenizer alone.

    Everything lies under `root_uri`, under names that follow from what decides the weights (`model_name`): a finished
    tokenizer is reused, a killed run carries on. Raises ValueError for a data set that is missing or does not fit, and
    where one that is `only_find` is not there.
    """
    store = VideoStore.open(f"{data_uri}/train")
    store.check_frames(config.frame_shape, _SIZE)
    name = model_name(
        "tokenizer", store.digest, config, ("data", "tokenizer", "train_tokenizer", "seed"), _TOKENIZER_CODE
    )
    if only_find and not checkpoint.is_model(f"{root_uri}/models/{name}"):
        raise ValueError("this cell's tokenizer was not trained: its training says why")
    torch.manual_seed(config.seed)
    genie = Genie(config)
    loader = functools.partial(_loader, store, config, config.train_tokenizer)
    return train_once("train-tokenizer", name, genie, genie.tokenizer, config.train_tokenizer, loader, root_uri, log)


def train_world(config: Config, data_uri: str, tokenizer_uri: str, root_uri: str, log: RunLog | None = None) -> str:
    """Phase two of section 2.1: LAM and dynamics are co-trained on a frozen tokenizer. Returns the Genie's URI.

    A reused Genie's `config.json` is the one it was trained with; what it shares with `config` is all that its weights
    depend on. The rest, `sampling` first of all, is for the caller to take from `config`.
    """
    store = VideoStore.open(f"{data_uri}/train")
    store.check_frames(config.frame_shape, _SIZE)
    tokenizer = checkpoint.load_tokenizer(tokenizer_uri)
    if tokenizer.config != config.tokenizer:
        raise ValueError(f"the tokenizer at {tokenizer_uri} was trained with another tokenizer config: train it anew")
    trained = ("data", "tokenizer", "train_tokenizer", "lam", "dynamics", "train_world", "cached_tokens", "seed")
    name = model_name("genie", store.digest, config, trained, _GENIE_CODE)
    torch.manual_seed(config.seed)
    genie = Genie(config)
    genie.tokenizer.load_state_dict(tokenizer.state_dict())
    genie.tokenizer.requires_grad_(False)

    def loader(rank: int, world_size: int) -> ClipLoader:
        tokens = tokens_of(config, store, tokenizer, root_uri) if config.cached_tokens else None
        return _loader(store, config, config.train_world, rank, world_size, tokens)

    return train_once("train-world", name, genie, genie, config.train_world, loader, root_uri, log)


def _loader(
    store: VideoStore, config: Config, stage: StageConfig, rank: int, world_size: int, tokens: VideoStore | None = None
) -> ClipLoader:
    return ClipLoader(store, stage.batch_size, config.data.clip_length, config.seed, rank, world_size, tokens)


def model_name(kind: str, data: str, config: Config, parts: tuple[str, ...], code: tuple[str, ...]) -> str:
    """<kind>-<digest of `data`, itself a digest, and of those parts of the config>-<digest of the code>.

    The three decide the weights, up to rounding that differs between machines and versions of torch. How a model is
    sampled, evaluated or watched does not. Comments do not count as code, but any other change of those files does,
    even where it leaves the weights alone: to train once too often is told and seen, an old model that passes for a
    new one is not. What other code trained stays where it is.
    """
    fields = {
        name: value
        for name, value in config.flat().items()
        if name.partition(".")[0] in parts and name.rpartition(".")[2] not in _WATCHING
    }
    trained = hashlib.sha256(f"{data} {json.dumps(fields, sort_keys=True)}".encode()).hexdigest()[:12]
    return f"{kind}-{trained}-{code_digest(code)}"


def train_once(
    step_name: str,
    name: str,
    whole: checkpoint.Whole,
    trained: nn.Module,
    stage: StageConfig,
    loader: Callable[[int, int], ClipLoader],
    root_uri: str,
    log: RunLog | None,
    keep: nn.Module | None = None,
) -> str:
    """Trains `trained`, a part of `whole` or all of it, unless that lies there already; returns the model's URI.

    Of what was trained the model is `keep` alone, if that is given.

    `loader` takes the part of every batch that is to be read: the how-manieth of how many.
    """
    model_uri = f"{root_uri}/models/{name}"
    if checkpoint.is_model(model_uri):
        if speaks():
            files.remove_tree(f"{root_uri}/training/{name}")  # left by a kill right after the model was whole
        summary(step_name, f"reused {model_uri}: this very code trained it with this config on this data")
        return model_uri
    with training(whole.config.parallel) as backend:
        state = backend.state(f"{root_uri}/training/{name}")
        if not state.latest_step() and (others := _by_other_code(name, root_uri)):
            summary(step_name, f"trains anew, for the code has changed since {', '.join(others)}: kept where it is")
        done = fit(
            trained,
            stage,
            loader(*backend.share),
            state,
            backend,
            desc=step_name,
            seed=whole.config.seed,
            log=log if log and backend.first else NoLog(),
        )
        came_to = done.final | {f"peak_memory_mb_{step_name.replace('-', '_')}": backend.peak_memory_mb()}
        checkpoint.save_training(model_uri, came_to)  # before what makes the model whole
        checkpoint.save_model(model_uri, whole, keep or trained, backend.whole)
        if backend.first:
            state.remove()
        summary(step_name, f"{done.text} -> {model_uri}")
    return model_uri


def _by_other_code(name: str, root_uri: str) -> list[str]:
    """URIs of the models, and of the unfinished training, that differ from `name` in their code alone."""
    same = name.rpartition("-")[0] + "-"
    return [
        f"{root_uri}/{folder}/{other}"
        for folder in ("models", "training")
        for other in files.names(f"{root_uri}/{folder}")
        if other.startswith(same) and other != name
    ]


class Trained(NamedTuple):
    text: str  # how it went, in a line
    final: dict[str, float]  # `final_<log>`: means over the last fifth of the steps, 300 at most (App. C.3: 300)


def fit(
    module: nn.Module,
    stage: StageConfig,
    loader: ClipLoader,
    state: TrainingState,
    backend: Backend,
    *,
    desc: str,
    seed: int,
    log: RunLog,
    on_step: Callable[[int], None] = lambda step: None,
) -> Trained:
    """Trains `module` in place from its newest checkpoint to `stage.steps`.

    Of the means a run that carried on knows those steps alone that it made itself. After SIGTERM it ends its step,
    saves and raises `Preempted`; the last step is left to end in a model.
    """
    watch = Watch(desc, module, stage, loader.clip_length, log, backend, lambda: state.saved_at)
    optimizers = backend.prepare(module, stage)
    start = state.restore(module, optimizers)
    frames_per_step = stage.batch_size * loader.clip_length
    began, logs = time.monotonic(), dict[str, float]()
    last = list[dict[str, Tensor]]()
    total, initial = stage.steps * frames_per_step, start * frames_per_step
    progress = bar(desc=desc, unit="frame", total=total, initial=initial)
    with preemption() as must_stop, state, watch, progress:
        for step, batch in watch.steps(start, loader.stream(start, stage.steps)):
            on_step(step)
            inputs, chance = backend.inputs(batch, Chance.of_step(seed, step, stage.batch_size))
            loss, tensors = backend.gradients(module, inputs, chance, stage.precision)
            gradient_norm = backend.clip(module, stage.optimizer.clip_norm)
            optimizers.step(learning_rate_share(step, stage.steps, stage.optimizer))
            backend.end_step()
            progress.update(frames_per_step)
            done = step + 1
            if done > stage.steps - min(stage.steps // 5, 300):
                last.append(tensors)  # not added up here: no step's program may differ from the others'
            if done % stage.log_every == 0 or done == stage.steps:
                logs = backend.numbers({**tensors, "loss": loss, "gradient_norm": gradient_norm})
                _check_finite(logs["loss"], step)
                log.metrics(logs | watch.reading(done), done)
                progress.set_postfix_str(_shown(logs))
            stopping = done < stage.steps and must_stop()
            if stopping or (done % stage.checkpoint_every == 0 and done < stage.steps):
                with watch.aside():
                    state.save(done, module, optimizers)
            if stopping:
                raise Preempted
    seconds = time.monotonic() - began
    resumed = f" (carried on from step {start:,})" if start else ""
    rate = (stage.steps - start) * frames_per_step / seconds
    text = f"{stage.steps:,} steps{resumed} in {seconds:.0f} s, {rate:,.0f} frames/s, {_shown(logs)}"
    finals = [backend.numbers(tensors) for tensors in last if tensors]
    return Trained(
        text,
        {f"final_{key.replace('/', '_')}": fmean(final[key] for final in finals) for key in (finals or [{}])[0]},
    )


def _check_finite(loss: float, step: int) -> None:
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise ValueError(f"the loss is {loss} at step {step}: lower optimizer.max_lr or use precision=fp32")


def _shown(logs: dict[str, float]) -> str:
    keys = (
        "psnr",
        "large/psnr",
        "code_perplexity",
        "lam/mse_over_copy",
        "lam/action_perplexity",
        "dynamics/cross_entropy",
        "accuracy",
        "loss",
    )
    return ", ".join(f"{key.rpartition('/')[2]} {logs[key]:.3g}" for key in keys if key in logs)
