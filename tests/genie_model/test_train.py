"""The trainer: killed and resumed equals uninterrupted; finished work is reused; broken input says what to do."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from genie_model import files
from genie_model.backend.processes import Native
from genie_model.chance import Chance
from genie_model.checkpoint import load_model, load_tokenizer, load_training, save_model
from genie_model.config import Config, ParallelConfig
from genie_model.data.loader import ClipLoader
from genie_model.data.store import VideoStore
from genie_model.genie import Genie
from genie_model.optim import Optimizers, learning_rate_share
from genie_model.presets import get_preset
from genie_model.progress import NoLog
from genie_model.train import fit, train_tokenizer, train_world
from genie_model.training_state import TrainingState

CONFIG = get_preset("tiny")


class Curve(NoLog):
    """Keeps the loss of every logged step."""

    def __init__(self) -> None:
        self.loss: dict[int, float] = {}

    def metrics(self, values, step=0) -> None:  # type: ignore[no-untyped-def]
        self.loss[step] = values["loss"]


class Killed(BaseException):
    pass


@pytest.fixture
def data_uri(tiny_data_uri: str) -> str:
    return tiny_data_uri


def run(config: Config, data_uri: str, state: TrainingState, kill_at: int | None = None) -> tuple[Genie, Curve]:
    torch.manual_seed(0)
    genie, curve = Genie(config), Curve()
    genie.tokenizer.requires_grad_(False)
    stage = config.train_world.model_copy(update={"log_every": 1})
    loader = ClipLoader(VideoStore.open(f"{data_uri}/train"), stage.batch_size, config.data.clip_length, seed=0)

    def on_step(step: int) -> None:
        if step == kill_at:
            raise Killed

    fit(genie, stage, loader, state, Native(ParallelConfig()), desc="test", seed=0, log=curve, on_step=on_step)
    return genie, curve


@pytest.mark.parametrize("kill_at", [3, 6])  # before the first checkpoint, and after it
def test_resumed_equals_uninterrupted(data_uri: str, tmp_path: Path, kill_at: int) -> None:
    genie, curve = run(CONFIG, data_uri, TrainingState(str(tmp_path / "whole")))
    broken = TrainingState(str(tmp_path / "broken"))
    with pytest.raises(Killed):
        run(CONFIG, data_uri, broken, kill_at)
    resumed_at = broken.latest_step()
    resumed, resumed_curve = run(CONFIG, data_uri, broken)
    assert resumed_at == (4 if kill_at > 4 else 0)
    assert resumed_curve.loss == {step: loss for step, loss in curve.loss.items() if step > resumed_at}
    for name, value in genie.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_training_lowers_the_loss(data_uri: str, tmp_path: Path) -> None:
    config = CONFIG.with_overrides("train_world.steps=40", "train_world.checkpoint_every=1000")
    _, curve = run(config, data_uri, TrainingState(str(tmp_path)))
    assert np.mean([curve.loss[s] for s in range(36, 41)]) < 0.8 * curve.loss[1]


def test_both_stages_finish_are_reused_and_keep_the_tokenizer(
    data_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path)
    tokenizer_uri = train_tokenizer(CONFIG, data_uri, root)
    world_uri = train_world(CONFIG, data_uri, tokenizer_uri, root)
    before, after = load_tokenizer(tokenizer_uri), load_model(world_uri).tokenizer
    for name, value in before.state_dict().items():
        assert torch.equal(value, after.state_dict()[name]), name
    assert not files.exists(f"{root}/training/{Path(world_uri).name}")  # a finished run leaves no checkpoints
    came_to = load_training(world_uri)
    assert 0 < came_to["final_dynamics_cross_entropy"] < 20
    assert came_to["peak_memory_mb_train_world"] > 100
    capsys.readouterr()
    monkeypatch.setattr("genie_model.train.fit", None)  # reuse trains nothing
    assert train_world(CONFIG, data_uri, train_tokenizer(CONFIG, data_uri, root), root) == world_uri
    assert capsys.readouterr().out.count("reused") == 2


def test_data_of_another_frame_size_is_refused(data_uri: str, tmp_path: Path) -> None:
    larger = CONFIG.with_overrides("data.frame_height=128", "data.frame_width=128")
    refusal = r"train has frames of 64x64, and data\.frame_width and data\.frame_height say 128x128: name a data set"
    with pytest.raises(ValueError, match=refusal):
        train_tokenizer(larger, data_uri, str(tmp_path))


def test_a_tokenizer_of_another_config_is_refused(data_uri: str, tmp_path: Path) -> None:
    tokenizer_uri = train_tokenizer(CONFIG, data_uri, str(tmp_path))
    other = CONFIG.with_overrides("tokenizer.codebook.num_codes=8")
    with pytest.raises(ValueError, match="another tokenizer config"):
        train_world(other, data_uri, tokenizer_uri, str(tmp_path))


def test_a_loss_that_is_not_finite_stops_the_run(data_uri: str, tmp_path: Path) -> None:
    class Broken(torch.nn.Linear):
        def forward(self, x: torch.Tensor, chance: Chance) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return self.weight.sum() * torch.nan, {}

    loader = ClipLoader(VideoStore.open(f"{data_uri}/train"), 2, 8, seed=0)
    with pytest.raises(ValueError, match=r"the loss is nan at step 1: lower optimizer\.max_lr"):
        fit(
            Broken(2, 2),
            CONFIG.train_world,
            loader,
            TrainingState(str(tmp_path)),
            Native(ParallelConfig()),
            desc="t",
            seed=0,
            log=NoLog(),
        )


def test_what_training_came_to_is_a_mean_over_its_last_fifth(data_uri: str, tmp_path: Path) -> None:
    class Counting(torch.nn.Linear):
        steps = 0

        def forward(self, x: torch.Tensor, chance: Chance) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            self.steps += 1
            return self.weight.sum(), {"part/count": torch.tensor(float(self.steps))}

    loader = ClipLoader(VideoStore.open(f"{data_uri}/train"), 2, 8, seed=0)
    stage = CONFIG.train_world.model_copy(update={"steps": 10})
    done = fit(
        Counting(2, 2),
        stage,
        loader,
        TrainingState(str(tmp_path)),
        Native(ParallelConfig()),
        desc="t",
        seed=0,
        log=NoLog(),
    )
    assert done.final == {"final_part_count": 9.5}


def test_missing_data_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="collect"):
        train_tokenizer(CONFIG, str(tmp_path / "nothing"), str(tmp_path))


@pytest.mark.parametrize("root", ["memory://models", "{tmp}"])
def test_models_round_trip(root: str, tmp_path: Path) -> None:
    uri = root.format(tmp=tmp_path) + "/model"
    torch.manual_seed(0)
    genie = Genie(CONFIG)
    save_model(uri, genie)
    loaded = load_model(uri)
    assert loaded.config == CONFIG
    assert not loaded.training
    for name, value in genie.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_broken_models_say_so(tmp_path: Path) -> None:
    uri = str(tmp_path / "model")
    with pytest.raises(ValueError, match="no model at"):
        load_model(uri)
    save_model(uri, Genie(CONFIG))
    whole = (tmp_path / "model/model.safetensors").read_bytes()
    (tmp_path / "model/model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="are broken"):
        load_model(uri)
    (tmp_path / "model/model.safetensors").write_bytes(whole)
    (tmp_path / "model/config.json").write_text(CONFIG.with_overrides("tokenizer.codebook.num_codes=8").to_json())
    with pytest.raises(ValueError, match="do not fit their config"):
        load_model(uri)
    genie = Genie(CONFIG)
    save_model(uri, genie, genie.lam)
    with pytest.raises(ValueError, match="do not fit their config") as refused:
        load_model(uri)
    assert len(str(refused.value)) < len(uri) + 400, "not every tensor's name"


def test_a_full_disk_is_one_clear_line_and_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file"
    files.write_atomic(str(target), b"old")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="the disk is full; free some space and run again"):
        files.write_atomic(str(target), b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_many_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    target, contents = tmp_path / "file", [bytes([number]) * 1000 for number in range(8)]
    with ThreadPoolExecutor(8) as hosts:
        list(hosts.map(lambda content: [files.write_atomic(str(target), content) for _ in range(20)], contents))
    assert target.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [target]


def test_every_parameter_has_the_optimizer_and_the_rate_of_its_kind() -> None:
    rates = {"max_lr": 1.0, "token_lr": 2.0, "muon_lr": 3.0, "weight_decay": 0.5}
    genie = Genie(CONFIG)
    optimizers = Optimizers(genie, CONFIG.train_world.optimizer.model_copy(update=rates))
    names = {parameter: name for name, parameter in genie.named_parameters()}
    found = {
        names[p]: (type(part).__name__, group["lr"], group["weight_decay"])
        for part in optimizers.parts
        for group in part.param_groups
        for p in group["params"]
    }
    assert set(found) == set(names.values())
    assert found["dynamics.token_in.weight"] == found["dynamics.logits_out.weight"] == ("AdamW", 2.0, 0.5)
    assert found["dynamics.logits_out.bias"] == ("AdamW", 2.0, 0.0)
    assert found["dynamics.position"] == found["dynamics.transformer.norm.weight"] == ("AdamW", 1.0, 0.0)
    assert found["lam.patch_out.weight"] == ("AdamW", 1.0, 0.5)
    by_muon = {name for name, (kind, _, _) in found.items() if kind == "Muon"}
    assert by_muon == {name for name in found if ".sublayers." in name and "norm" not in name and "scale" not in name}
    assert {found[name] for name in by_muon} == {("Muon", 3.0, 0.5)}


def test_without_muon_the_matrices_are_adamw_s() -> None:
    (adamw,) = Optimizers(Genie(CONFIG), CONFIG.train_world.optimizer.model_copy(update={"muon_lr": 0.0})).parts
    assert sum(len(group["params"]) for group in adamw.param_groups) == len(list(Genie(CONFIG).parameters()))


def test_learning_rate_warms_up_and_decays() -> None:
    config = CONFIG.train_world.optimizer.model_copy(update={"warmup_steps": 10, "max_lr": 2.0, "min_lr": 0.2})
    shares = [learning_rate_share(step, 110, config) for step in range(111)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[9] == shares[10] == 1.0
    assert shares[60] == pytest.approx(0.55)
    assert shares[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(shares[10:]))
