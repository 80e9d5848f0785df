"""What is seen of a training while it runs: where its time goes, over HTTP too, and a step that stalls."""

from __future__ import annotations

import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from genie_model import describe, speed
from genie_model.backend import native
from genie_model.backend.processes import Native
from genie_model.chance import Chance
from genie_model.config import ParallelConfig
from genie_model.data.loader import Batch, ClipLoader
from genie_model.data.store import VideoStore
from genie_model.exporter import PORT_VARIABLE, READINGS, Exporter
from genie_model.genie import Genie
from genie_model.policy import Policy
from genie_model.presets import get_preset
from genie_model.progress import NoLog
from genie_model.train import fit
from genie_model.training_state import TrainingState
from genie_model.watch import Watch

CONFIG = get_preset("tiny")
STALL = 0.6


class Kept(NoLog):
    """Keeps what is logged, by name and step."""

    def __init__(self) -> None:
        self.values: dict[str, dict[int, float]] = {}

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        for name, value in values.items():
            self.values.setdefault(name, {})[step] = value


class SlowLoader(ClipLoader):
    seconds: Mapping[int, float] = {}

    def stream(self, *span: int) -> Iterator[tuple[int, Batch]]:
        for step, batch in super().stream(*span):
            time.sleep(self.seconds.get(step, 0.0))
            yield step, batch


class SlowState(TrainingState):
    def save(self, *args) -> None:  # type: ignore[no-untyped-def]
        time.sleep(2 * STALL)
        super().save(*args)


class SlowModel(torch.nn.Linear):
    """It takes its weights' product as its work, and so long for a step."""

    def __init__(self, seconds: Mapping[int, float]) -> None:
        super().__init__(2, 2)
        self.seconds, self.steps = seconds, 0

    def forward(self, x: torch.Tensor, chance: Chance | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if not isinstance(x, torch._subclasses.FakeTensor):
            time.sleep(self.seconds.get(self.steps, 0.0))
            self.steps += 1
        return (self.weight @ self.weight).sum(), {}


def watched(
    data_uri: str,
    folder: Path,
    loading: Mapping[int, float] | None = None,
    working: Mapping[int, float] | None = None,
    on_step: Callable[[int], None] = lambda step: None,
    **fields: float,
) -> Kept:
    """What a training logs of which some batches, and some steps, take so many seconds."""
    log, loader = Kept(), SlowLoader(VideoStore.open(f"{data_uri}/train"), 2, 8, seed=0)
    loader.seconds = loading or {}
    stage = CONFIG.train_world.model_copy(update={"steps": 8, "log_every": 1, "checkpoint_every": 100} | fields)
    fit(
        SlowModel(working or {}),
        stage,
        loader,
        SlowState(str(folder)),
        Native(ParallelConfig()),
        desc="t",
        seed=0,
        log=log,
        on_step=on_step,
    )
    return log


def test_a_wait_for_data_is_told_from_work(tiny_data_uri: str, tmp_path: Path) -> None:
    slow, reading = dict.fromkeys(range(16), 0.2), 16  # of the last eight steps
    loading = watched(tiny_data_uri, tmp_path, loading=slow, steps=16, log_every=8).values
    working = watched(tiny_data_uri, tmp_path, working=slow, steps=16, log_every=8).values
    assert loading["data_wait_share"][reading] > 0.5
    assert working["data_wait_share"][reading] < 0.2
    assert working["step_seconds"][reading] >= 0.2
    assert working["frames_per_second"][reading] <= 2 * 8 / 0.2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("times_the_work", "starved"), [(0.5, False), (2.0, True)])
def test_a_wait_that_an_accelerator_works_through_does_not_count(times_the_work: float, starved: bool) -> None:
    weights = torch.randn(8192, 8192, device="cuda").bfloat16()

    def work(products: int) -> torch.Tensor:
        for _ in range(products):
            product = weights @ weights
        return product.float().mean()

    work(100).item()
    seconds = speed.seconds_of(lambda: work(100))
    watch = Watch("t", SlowModel({}), CONFIG.train_world, 8, NoLog(), Native(ParallelConfig()), time.monotonic)
    batch = Batch(np.zeros((2, 8, 4, 4, 3), np.uint8))
    loading = ((step, batch) for step in range(20) if not time.sleep(seconds * times_the_work))
    with watch:
        for step, _ in watch.steps(0, loading):
            loss = work(100)
            if step % 10 == 9:
                loss.item()
                share = watch.reading(step + 1)["data_wait_share"]
    assert (share > 0.4) == starved
    assert (share < 0.2) != starved


@pytest.mark.parametrize(
    ("slow", "cause", "place"),
    [
        ("loading", "it waits for the next batch (the loader)", "time.sleep(self.seconds.get(step, "),
        (
            "working",
            "it waits for the device (its work, or other processes)",
            "time.sleep(self.seconds.get(self.steps, ",
        ),
    ],
)
def test_a_step_that_stalls_is_reported_once_with_its_cause(
    slow: str, cause: str, place: str, tiny_data_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = {0: 2 * STALL, 6: 5 * STALL}  # the first step may take its time
    log = watched(tiny_data_uri, tmp_path, checkpoint_every=7, stall_seconds=STALL, **{slow: seconds})  # type: ignore[arg-type]
    screen = capsys.readouterr().err
    told = [line for line in screen.splitlines() if line.startswith("[t] step")]
    assert len(told) == 2
    assert told[0].startswith("[t] step 6 has taken ")
    assert told[0].endswith(cause)
    assert screen.count(place) == 1
    assert told[1].startswith("[t] step 6 goes on: it took ")
    assert log.values["stalled_seconds"].keys() == {6}
    assert log.values["stalled_seconds"][6] > 2 * STALL


def scraped(address: str) -> dict[str, float]:
    text = urllib.request.urlopen(address, timeout=10).read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert all(sample.labels == {"stage": "t"} for sample in samples)
    return {sample.name.removeprefix("genie_training_"): sample.value for sample in samples}


def test_prometheus_reads_what_is_logged_for_as_long_as_training_runs(
    tiny_data_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(PORT_VARIABLE, "0")
    seen: dict[int, dict[str, float]] = {}
    elapsed: dict[int, float] = {}
    address, began = "", time.monotonic()

    def look(step: int) -> None:
        nonlocal address
        address = address or capsys.readouterr().err.partition("metrics at ")[2].split()[0]
        if step == 6:
            while not seen.get(6, {}).get("stalled"):
                seen[6] = scraped(address)
        seen[step] = scraped(address)
        elapsed[step] = time.monotonic() - began

    log = watched(tiny_data_uri, tmp_path, on_step=look, checkpoint_every=5, stall_seconds=STALL)
    assert not READINGS.keys() & seen[0].keys()
    for name in READINGS:
        assert seen[7][name] == log.values[name][7], name
    assert seen[4]["checkpoint_age_seconds"] <= elapsed[4]  # since the start
    assert seen[7]["checkpoint_age_seconds"] <= elapsed[7] - elapsed[4] - 2 * STALL  # since the save after step 4
    assert [seen[step]["step"] for step in (1, 7)] == [1, 7]
    assert [seen[step]["stalled"] for step in (5, 6)] == [0, 1]
    assert [seen[step]["stalls_total"] for step in (5, 7)] == [0, 1]
    with pytest.raises(urllib.error.URLError):
        scraped(address)


def test_a_port_in_use_is_told_and_trained_on(
    tiny_data_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("0.0.0.0", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setenv(PORT_VARIABLE, str(port))
        assert watched(tiny_data_uri, tmp_path).values["loss"].keys() == set(range(1, 9))
    assert f"[t] no metrics on port {port}: " in capsys.readouterr().err


def test_the_port_is_each_process_s_own_and_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert Exporter("t", lambda: 0.0).port is None
    monkeypatch.setenv(PORT_VARIABLE, "9000")
    assert Exporter("t", lambda: 0.0).port == 9003
    monkeypatch.setenv(PORT_VARIABLE, "http")
    with pytest.raises(ValueError, match="GENIE_METRICS_PORT=http is no port"):
        Exporter("t", lambda: 0.0)


@pytest.mark.parametrize("cached_tokens", [False, True])
def test_a_step_s_flops_are_counted_without_a_trace(cached_tokens: bool) -> None:
    config, clips = CONFIG.with_overrides(f"cached_tokens={cached_tokens}"), 3
    genie = Genie(config)
    frames = np.zeros((clips, config.data.clip_length, *config.frame_shape), np.uint8)
    codes = np.zeros((*frames.shape[:2], genie.tokenizer.num_patches, config.tokenizer.codes_per_patch), np.int64)
    before, chance = {name: x.clone() for name, x in genie.state_dict().items()}, torch.get_rng_state()
    flops = speed.flops_counter(genie, "bf16")(Batch(frames, codes if cached_tokens else None))
    assert torch.equal(torch.get_rng_state(), chance)
    for name, value in genie.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert flops == describe.training_cost(genie, config, 1, "bf16").flops


def test_a_policy_s_flops_are_counted_too() -> None:
    frames = np.zeros((2, CONFIG.policy.context, *CONFIG.frame_shape), np.uint8)
    actions = np.zeros(frames.shape[:2], np.int64)
    assert speed.flops_counter(Policy(CONFIG, 15), "fp32")(Batch(frames, None, actions)) > 1e6


def test_mfu_is_flops_over_time_and_peak(tiny_data_uri: str, tmp_path: Path) -> None:
    log = watched(tiny_data_uri, tmp_path, precision="fp32").values  # type: ignore[arg-type]
    peak = speed.peak_flops("CPU", "fp32")
    assert peak is not None
    flops = 3 * 2 * 2**3 * 2  # a product of 2 by 2 and two in its backward pass, for each of two clips
    assert log["mfu"][8] == pytest.approx(flops / log["step_seconds"][8] / peak)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("TPU v5p", 459e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
    ],
)
def test_peaks_are_of_known_devices_alone(name: str, peak: float | None) -> None:
    assert speed.vendor_peak(name) == peak


def test_every_compiled_graph_counts() -> None:
    double = torch.compile(lambda x: 2 * x, backend="eager", dynamic=False)
    before = native.compile_count()
    for length in (2, 2, 3):
        double(torch.ones(length))
    assert native.compile_count() == before + 2
