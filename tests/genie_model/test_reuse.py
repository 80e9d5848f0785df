"""A finished model is reused for as long as nothing has changed that its weights depend on."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import genie_model
from genie_model import evaluate, train
from genie_model.config import Config
from genie_model.data import curation
from genie_model.presets import get_preset
from genie_model.source import code_digest

CONFIG = get_preset("tiny").with_overrides("train_tokenizer.steps=2", "train_world.steps=2")
# Modules that training imports, but that leave the weights alone: the data set's digest says what they read.
HARMLESS = {
    "backend.compiled",
    "backend.graphs",
    "cache",
    "checkpoint",
    "config",
    "config_node",
    "data.columns",
    "data.opt_out",
    "data.shards",
    "exporter",
    "files",
    "maskgit",
    "preemption",
    "progress",
    "source",
    "speed",
    "training_state",
    "video_config",
    "watch",
}


@pytest.fixture
def data_uri(tiny_data_uri: str) -> str:
    return tiny_data_uri


def both(config: Config, data_uri: str, root: Path) -> tuple[str, str]:
    tokenizer_uri = train.train_tokenizer(config, data_uri, str(root))
    return tokenizer_uri, train.train_world(config, data_uri, tokenizer_uri, str(root))


@pytest.mark.parametrize(
    "override",
    [
        "sampling.temperature=0.5",
        "train_tokenizer.log_every=1",
        "train_tokenizer.checkpoint_every=1",
        "train_world.log_every=1",
        "train_world.checkpoint_every=1",
        "train_world.stall_seconds=1000",
        "evaluation.clips=3",
        "promotion.min_delta_psnr=1",
        "parallel.remat=true",
    ],
)
def test_what_the_weights_do_not_depend_on_trains_nothing_anew(override: str, data_uri: str, tmp_path: Path) -> None:
    assert both(CONFIG.with_overrides(override), data_uri, tmp_path) == both(CONFIG, data_uri, tmp_path)


@pytest.mark.parametrize("override", ["train_world.steps=3", "lam.codebook.commitment=0.5", "seed=1"])
def test_what_the_weights_depend_on_trains_anew(override: str, data_uri: str, tmp_path: Path) -> None:
    assert both(CONFIG.with_overrides(override), data_uri, tmp_path)[1] != both(CONFIG, data_uri, tmp_path)[1]


def test_changed_code_trains_anew_says_why_and_keeps_the_old(
    data_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = both(CONFIG, data_uri, tmp_path)
    assert "trains anew" not in capsys.readouterr().out
    monkeypatch.setattr(train, "code_digest", lambda names: "0123abcd")
    after = both(CONFIG, data_uri, tmp_path)
    screen = capsys.readouterr().out
    for old, new in zip(before, after, strict=True):
        assert old != new
        assert Path(old, "model.safetensors").exists()
        assert f"trains anew, for the code has changed since {old}: kept where it is" in screen
    assert both(CONFIG, data_uri, tmp_path) == after


def test_comments_are_no_code(tmp_path: Path) -> None:
    def digest(source: str) -> str:
        (tmp_path / "a.py").write_text(source)
        return code_digest(["a.py"], tmp_path)

    plain = digest("def double(x):\n    return 2 * x\n")
    assert digest('"""Words."""\n\n# more\ndef double(x):\n    """Words."""\n    return 2*x\n') == plain
    assert digest("def double(x):\n    return 2.0 * x\n") != plain


def reached_from(start: str) -> set[str]:
    """The library's modules that `start` imports, and those that they import, itself among them."""
    folder = Path(genie_model.__file__).parent
    seen: set[str] = set()
    left = {start}
    while left:
        module = left.pop()
        seen.add(module)
        path = folder / (module.replace(".", "/") + ".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("genie_model"):
                for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                    inner = str(name).removeprefix("genie_model").removeprefix(".")
                    files = (inner,) if inner else ()
                    left |= {m for m in files if (folder / (m.replace(".", "/") + ".py")).is_file() and m not in seen}
    return seen


def modules(files: tuple[str, ...]) -> set[str]:
    return {name.removesuffix(".py").replace("/", ".") for name in files}


def test_all_code_that_decides_the_weights_is_named() -> None:
    assert modules(train._GENIE_CODE) == reached_from("train") - HARMLESS


def test_all_code_that_decides_the_figures_is_named() -> None:
    """What is left alone only reads and writes files, draws pictures, or trains."""
    reads = {
        "cache",
        "checkpoint",
        "config",
        "config_node",
        "data.columns",
        "data.opt_out",
        "data.shards",
        "files",
        "source",
        "video_config",
    }
    trains = {
        "backend.capture",
        "backend.processes",
        "backend.seam",
        "backend.sharding",
        "backend.xla",
        "chance",
        "collectives",
        "data.loader",
        "optim",
    }
    harmless = reads | trains | {"pictures", "progress"}
    assert modules(evaluate._CODE) == reached_from("evaluate") - harmless


def test_all_code_that_decides_a_clip_s_probability_is_named() -> None:
    """Beside what training a world reads, the classifier's measures and pictures are left alone."""
    others = reached_from("data.curation") - reached_from("train") - {"metrics", "pictures"}
    assert others == modules(curation.CODE)
