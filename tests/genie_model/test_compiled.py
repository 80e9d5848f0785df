"""Play compiled on a CPU is the eager one's up to rounding, and each world's bits are its own."""

import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from genie_model.backend.graphs import prepare_play
from genie_model.checkpoint import load_model, save_model
from genie_model.genie import Genie, PlayState
from genie_model.presets import get_preset

CONFIG = get_preset("tiny").with_overrides("sampling.maskgit_steps=3", "sampling.compile=true")


def model() -> Genie:
    torch.manual_seed(0)
    return Genie(CONFIG).eval()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Genie:
    """Compiled once, for its two transformers are alike."""
    if not shutil.which("g++"):
        pytest.skip("no g++ here to compile with")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENIE_CACHE_DIR", str(folder := tmp_path_factory.mktemp("cache")))
        genie = model()
        prepare_play(genie)
        (made,) = (folder / "compiled").iterdir()
        patch.setenv("CXX", "no-compiler")
        other = model()
        prepare_play(other)  # from then on, no compiler is needed
        other.config = other.config.with_overrides("sampling.compile=false")
        prepare_play(other)
        assert "through" not in vars(other.dynamics.transformer)
        other.config = CONFIG
        prepare_play(other)
        part = weakref.ref(other.dynamics.transformer)
        del other
        assert part() is None  # a version that nobody plays leaves memory at once
        whole = made.read_bytes()
        made.write_bytes(whole[: len(whole) // 2])  # by a machine that went down
        with pytest.raises(ValueError, match=r"install g\+\+"):
            prepare_play(model())  # it would be made again
        assert not made.exists()
    return genie


def play(genie: Genie, state: PlayState, steps: int = 3) -> list[Tensor]:
    frames = [genie.step(state, torch.full((len(state.seeds),), step % 4)) for step in range(steps)]
    genie.remember(state)
    return [*frames, state.codes_BNC]


def test_a_compiled_world_is_the_eager_one_and_the_same_alone_beside_others_and_after_a_pause(compiled: Genie) -> None:
    frames = torch.randint(0, 256, (2, 3, 64, 64, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    eager = model()
    seen = {}
    for genie in (eager, compiled):
        old, young = genie.start(frames[:1, :1], seed=3), genie.start(frames[1:], seed=4)
        first = play(genie, old, CONFIG.data.clip_length + 1)  # its rings are full then, those of the other are not
        alone = [play(genie, state.fork()) for state in (old, young)]
        together = play(genie, PlayState.stack([old, young]))
        seen[genie] = [*first, *together]
        if genie is compiled:
            for both, of_old, of_young in zip(together, *alone, strict=True):
                assert torch.equal(both, torch.cat([of_old, of_young]))
    for a, b in zip(*seen.values(), strict=True):
        assert (a.float() - b.float()).abs().max() <= 1  # of 255

    state, codes = compiled.start(frames[:1, :1], seed=3), []
    codes.append(state.codes_BNC)
    for _ in range(3):
        compiled.step(state, torch.tensor([1]))
        codes.append(state.codes_BNC)
    left = compiled.resume(torch.stack(codes, 1), torch.tensor([[-1, 1, 1, 1]]), [3], [4])
    assert torch.equal(compiled.step(left, torch.tensor([2])), compiled.step(state, torch.tensor([2])))
    compiled.remember(left)
    compiled.remember(state)
    for kept, again in zip(state.dynamics.rings.values(), left.dynamics.rings.values(), strict=True):
        assert all(map(torch.equal, kept, again))


def test_threads_play_it_at_the_same_time(compiled: Genie) -> None:
    start = compiled.start(torch.zeros(1, 1, *CONFIG.frame_shape, dtype=torch.uint8))
    alone = play(compiled, start.fork())
    with ThreadPoolExecutor(3) as threads:
        for found in threads.map(lambda _: play(compiled, start.fork()), range(12)):
            assert all(map(torch.equal, alone, found))


def test_without_a_compiler_or_a_place_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GENIE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-compiler")
    with pytest.raises(ValueError, match=r"install g\+\+"):
        prepare_play(model())
    assert not list((tmp_path / "compiled").iterdir())
    (tmp_path / "file").touch()
    monkeypatch.setenv("GENIE_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot be written .*set GENIE_CACHE_DIR"):
        prepare_play(model())


def test_a_model_is_prepared_for_the_sampling_that_is_asked_for_not_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiled: Genie
) -> None:
    monkeypatch.setenv("GENIE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-compiler")
    save_model(f"{tmp_path}/model", model())
    with pytest.raises(ValueError, match=r"install g\+\+"):
        load_model(f"{tmp_path}/model")
    asked = CONFIG.with_overrides("sampling.compile=false", "sampling.precision=bf16").sampling
    assert load_model(f"{tmp_path}/model", asked).config.sampling == asked

    state = compiled.start(torch.zeros(1, 1, *CONFIG.frame_shape, dtype=torch.uint8))
    monkeypatch.setattr(compiled, "config", CONFIG.with_overrides("sampling.precision=bf16"))
    with pytest.raises(AssertionError, match="another precision"):
        compiled.step(state, torch.tensor([1]))
