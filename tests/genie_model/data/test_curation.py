"""From labels to the clips that are kept, on videos of which half are games that scroll and half menus."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from curation_help import CONFIG, is_good, write_true_labels, write_videos

from genie_model.config import Config
from genie_model.data import curation
from genie_model.data.labels import read_labels, write_labels
from genie_model.data.store import VideoStore
from genie_model.progress import NoLog
from genie_model.train import train_tokenizer

VIDEOS = 12


def video_of(store: VideoStore, episode: int) -> int:
    return int(store.about(episode)["source"].removeprefix("video-").removesuffix(".mp4"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, its labels, and a trained classifier. Do not change them: take `copied`."""
    root = tmp_path_factory.mktemp("curation")
    data_uri = write_videos(f"{root}/datasets/video", range(VIDEOS))
    curation.train_classifier(CONFIG, data_uri, write_true_labels(f"{root}/labels.json", data_uri), str(root))
    return root


@pytest.fixture
def copied(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root, tmp_path / "root"))


def steps(root: Path, config: Config = CONFIG, **share: tuple[int, int]) -> tuple[str, str, str]:
    """The classifier, and its scores under `root`."""
    data_uri = f"{root}/datasets/video"
    classifier_uri = curation.train_classifier(config, data_uri, f"{root}/labels.json", str(root))
    return data_uri, classifier_uri, curation.score(config, data_uri, classifier_uri, str(root), **share)


def parts(scores_uri: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(scores_uri).glob("part-*.npy"))}


def test_it_tells_games_from_menus_in_videos_that_it_never_saw(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taught: set[str] = set()
    init = curation.LabelledLoader.__init__

    def watched(self: curation.LabelledLoader, store, clips, *rest) -> None:  # type: ignore[no-untyped-def]
        taught.update(clip.source for clip in clips)
        init(self, store, clips, *rest)

    monkeypatch.setattr(curation.LabelledLoader, "__init__", watched)
    shutil.rmtree(copied / "models")
    _, classifier_uri, _ = steps(copied)
    found = curation.held_out_metrics(CONFIG, classifier_uri)
    assert found["curator_auc"] == found["curator_precision"] == found["curator_recall"] == 1
    assert found["curator_base_rate"] == 0.5
    rows = json.loads(Path(classifier_uri, "held_out.json").read_text())
    measured = {row["source"] for row in rows}
    assert not measured & taught
    assert len(measured | taught) == VIDEOS
    assert curation.held_out_confusion(CONFIG, classifier_uri) == [[len(rows) // 2, 0], [0, len(rows) // 2]]


def test_a_batch_is_half_good_and_a_function_of_its_step(root: Path) -> None:
    store = VideoStore.open(f"{root}/datasets/video/train")
    clips = curation.labelled_clips(store, f"{root}/labels.json")
    assert [clip.good for clip in clips] == [is_good(video_of(store, clip.episode)) for clip in clips]
    part = CONFIG.curation
    whole = curation.LabelledLoader(store, clips[:7], part, 0, 1)
    for step, batch in whole.stream(3, 6):
        assert batch.labels_B is not None
        assert batch.labels_B.tolist() == [0, 1] * 4
        assert batch.frames_BTHWC.shape == (8, 2, 32, 32, 3)
        halves = [curation.LabelledLoader(store, clips[:7], part, rank, 2).batch(step) for rank in range(2)]
        assert np.array_equal(batch.frames_BTHWC, np.concatenate([half.frames_BTHWC for half in halves]))
    assert not np.array_equal(whole.batch(3).frames_BTHWC, whole.batch(4).frames_BTHWC)


def test_frames_are_spread_evenly(root: Path) -> None:
    store = VideoStore.open(f"{root}/datasets/video/train")
    frames = store.frames(4, 0, 12)
    assert np.array_equal(curation.spread_frames(store, 4, np.full(3, 0.5)), frames[[2, 6, 10]])
    assert np.array_equal(curation.spread_frames(store, 4, np.array([0, 0.999])), frames[[0, 11]])


@pytest.mark.parametrize(
    ("threshold", "confidence", "kept"),
    [(0.5, 0, [0.5, 0.6, 0.9]), (0.5, 0.5, [0.9]), (0.95, 0, []), (0, 0.6, [0.9]), (0, 0, [0.1, 0.4, 0.5, 0.6, 0.9])],
)
def test_the_rule_asks_for_prediction_and_confidence(threshold: float, confidence: float, kept: list[float]) -> None:
    part = CONFIG.with_overrides(f"curation.threshold={threshold}", f"curation.confidence={confidence}").curation
    found = np.array([0.1, 0.4, 0.5, 0.6, 0.9, np.nan])
    assert found[curation.keeps(part, found)].tolist() == kept


def test_the_same_labels_teach_once_whatever_the_rule(copied: Path) -> None:
    data_uri, labels_uri = f"{copied}/datasets/video", f"{copied}/labels.json"
    known = {path.name for path in (copied / "models").iterdir()}

    def name(config: Config = CONFIG) -> str:
        return curation.train_classifier(config, data_uri, labels_uri, str(copied)).rpartition("/")[2]

    assert {name(), name(CONFIG.with_overrides("curation.threshold=0.9", "curation.confidence=0.5", "seed=7"))} == known
    assert name(CONFIG.with_overrides("curation.steps=2")) not in known
    labels = list(read_labels(labels_uri).values())
    write_labels(labels_uri, [labels[0].model_copy(update={"label": 3}), *reversed(labels[1:])])
    changed = name(CONFIG.with_overrides("curation.steps=2"))
    write_labels(labels_uri, labels)
    assert changed != name(CONFIG.with_overrides("curation.steps=2"))


def test_what_no_data_set_has_cannot_teach(copied: Path) -> None:
    other = write_videos(f"{copied}/datasets/other", range(20, 24), clips=1)
    with pytest.raises(ValueError, match="has none of the 36 clips"):
        curation.train_classifier(CONFIG, other, f"{copied}/labels.json", str(copied))


def test_scores_carry_on_and_can_be_shared(copied: Path) -> None:
    data_uri, classifier_uri, scores_uri = steps(copied)
    whole = parts(scores_uri)
    assert len(whole) == VIDEOS
    Path(scores_uri, sorted(whole)[4]).unlink()
    kept = {name: Path(scores_uri, name).stat().st_mtime_ns for name in parts(scores_uri)}
    with pytest.raises(ValueError, match="1 of 12 parts are missing"):
        curation.curate(CONFIG, data_uri, scores_uri, str(copied))
    assert steps(copied)[2] == scores_uri
    assert parts(scores_uri) == whole
    assert all(Path(scores_uri, name).stat().st_mtime_ns == written for name, written in kept.items())
    shutil.rmtree(scores_uri)
    curation.score(CONFIG, data_uri, classifier_uri, str(copied), share=(1, 2))
    assert list(parts(scores_uri)) == sorted(whole)[1::2]
    curation.score(CONFIG, data_uri, classifier_uri, str(copied), share=(0, 2))
    assert parts(scores_uri) == whole


def test_many_shards_are_scored_together(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, scores_uri = steps(copied)
    each = np.concatenate([np.load(f"{scores_uri}/{name}") for name in parts(scores_uri)])
    shutil.rmtree(scores_uri)
    monkeypatch.setattr(curation, "_MOST_PARTS", 5)
    data_uri, *_ = steps(copied)
    assert len(parts(scores_uri)) == 4
    together = np.concatenate([np.load(f"{scores_uri}/{name}") for name in parts(scores_uri)])
    assert np.allclose(each, together, atol=0.02), "bfloat16, in batches of other sizes"
    curated = VideoStore.open(curation.curate(CONFIG, data_uri, scores_uri, str(copied)) + "/train")
    assert all(is_good(video_of(curated, episode)) for episode in range(curated.num_episodes))


def test_the_kept_clips_are_listed_and_nothing_is_copied(copied: Path) -> None:
    data_uri, _, scores_uri = steps(copied)

    found = dict[str, float]()

    class Log(NoLog):
        def metrics(self, values, step: int = 0) -> None:  # type: ignore[no-untyped-def]
            found.update(values)

    curated_uri = curation.curate(CONFIG, data_uri, scores_uri, str(copied), Log())
    before, after = VideoStore.open(f"{data_uri}/train"), VideoStore.open(f"{curated_uri}/train")
    assert [video_of(after, episode) % 2 for episode in range(after.num_episodes)] == [1] * 18
    good = [episode for episode in range(before.num_episodes) if is_good(video_of(before, episode))]
    assert all(np.array_equal(after.frames(i, 0, 12), before.frames(episode, 0, 12)) for i, episode in enumerate(good))
    whole = VideoStore.open(f"{curated_uri}/eval")
    assert whole.num_episodes == 36
    assert not list(Path(curated_uri).rglob("*.tar"))
    assert found["curated_clips"] == 18
    assert found["curated_share"] == 0.5
    assert found["curated_hours"] == pytest.approx(18 * 12 / CONFIG.ingest.fps / 3600)
    assert found["curator_precision"] == 1
    index = Path(curated_uri, "train", "index.json")
    written = index.stat().st_mtime_ns
    assert curation.curate(CONFIG, data_uri, scores_uri, str(copied)) == curated_uri
    assert index.stat().st_mtime_ns == written
    assert train_tokenizer(CONFIG.with_overrides("train_tokenizer.steps=1"), curated_uri, str(copied))


def test_a_rule_that_keeps_everything_makes_no_data_set_and_one_that_keeps_nothing_none(copied: Path) -> None:
    data_uri, _, scores_uri = steps(copied)
    everything = CONFIG.with_overrides("curation.threshold=0", "curation.confidence=0")
    assert curation.curate(everything, data_uri, scores_uri, str(copied)) == data_uri
    assert set(curation.figures(everything, data_uri, data_uri, scores_uri)) == {
        "curated_clips", "curated_share", "curated_hours"
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"no clip is kept by curation\.threshold=1 and"):
        curation.curate(
            CONFIG.with_overrides("curation.threshold=1", "curation.confidence=1"), data_uri, scores_uri, str(copied)
        )
    assert not list((copied / "datasets").glob("curated-*"))


def test_an_opt_out_hides_clips_everywhere_and_costs_one_part(copied: Path) -> None:
    data_uri, classifier_uri, scores_uri = steps(copied)
    whole = parts(scores_uri)
    curated_uri = curation.curate(CONFIG, data_uri, scores_uri, str(copied))
    Path(data_uri, "opt_out.txt").write_text("video-3.mp4\n")
    assert 3 not in {video_of(store, i) for store in [VideoStore.open(f"{curated_uri}/train")] for i in range(15)}
    assert VideoStore.open(f"{curated_uri}/train").num_episodes == 15
    with pytest.raises(ValueError, match="1 of 12 parts are missing"):
        curation.curate(CONFIG, data_uri, scores_uri, str(copied))
    curation.score(CONFIG, data_uri, classifier_uri, str(copied))
    assert len(parts(scores_uri).keys() - whole.keys()) == 1, "that of no clips"
    again = VideoStore.open(curation.curate(CONFIG, data_uri, scores_uri, str(copied)) + "/train")
    assert again.num_episodes == 15
