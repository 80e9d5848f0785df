"""Champion, previous and the way back, on a real MLflow store (SQLite)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from genie_model.checkpoint import save_model
from genie_model.data.coinrun import collect, of_today
from genie_model.data.store import VideoStore
from genie_model.evaluate import evaluate
from genie_model.genie import Genie
from genie_model.presets import get_preset
from genie_model.tracking import StepRun, check_champion, own_data, promote, register, rollback, step

TINY = get_preset("tiny")
GOOD = {"delta_psnr_t4": 1.0, "delta_psnr_t4_ci95": 0.3, "lam_action_usage": 1.0, "rollout_psnr_t1": 20.0}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StepRun]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("GENIE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    torch.manual_seed(0)
    save_model(str(tmp_path / "model"), Genie(TINY))
    with step("promote", "tiny", root_uri="here") as opened:
        yield opened


def registered(run: StepRun, data_uri: str, **metrics: float) -> str:
    """One more version, with these figures instead of GOOD's."""
    note = Path("model", "note.txt")
    note.write_text(f"{note.read_text() if note.exists() else ''}another model\n")
    return register("model", GOOD | metrics, data_uri, run)


def aliases(client: MlflowClient) -> dict[str, str]:
    return {alias: str(number) for alias, number in client.get_registered_model("genie").aliases.items()}


def test_the_former_champion_is_one_command_away_and_the_one_before_two(run: StepRun, tiny_data_uri: str) -> None:
    client = run.client
    for delta in (1.0, 2.0, 3.0):
        assert promote(registered(run, tiny_data_uri, delta_psnr_t4=delta), tiny_data_uri, run).promoted
    assert aliases(client) == {"champion": "3", "previous": "2"}

    assert rollback(client, dry_run=True) == ("genie: champion would go from version 3 back to 2; previous: version 1")
    assert aliases(client) == {"champion": "3", "previous": "2"}
    assert "rolled_back" not in client.get_model_version("genie", "3").tags

    assert rollback(client) == "genie: champion went from version 3 back to 2; previous: version 1"
    assert aliases(client) == {"champion": "2", "previous": "1"}
    again = promote("3", tiny_data_uri, run)
    assert not again.promoted
    assert "it was rolled back on " in again.reason
    assert aliases(client) == {"champion": "2", "previous": "1"}

    assert rollback(client) == "genie: champion went from version 2 back to 1; previous: none"
    assert aliases(client) == {"champion": "1"}
    with pytest.raises(ValueError, match="nothing to go back to: no version of 'genie' has the alias 'previous'"):
        rollback(client)

    client.delete_model_version_tag("genie", "3", "rolled_back")
    assert promote("3", tiny_data_uri, run).promoted, "who deletes the tag lets it compete again"
    assert aliases(client) == {"champion": "3", "previous": "1"}


def test_a_dry_run_measures_and_changes_nothing(run: StepRun, tiny_data_uri: str) -> None:
    client = run.client
    first = registered(run, tiny_data_uri)
    assert promote(first, tiny_data_uri, run).promoted
    registered(run, tiny_data_uri, delta_psnr_t4=2.0)
    client.set_model_version_tag("genie", first, "measured_on", "elsewhere")

    def state() -> list[Any]:
        versions = [client.get_model_version("genie", number) for number in ("1", "2")]
        models = [client.get_logged_model(version.source.removeprefix("models:/")).metrics for version in versions]
        return [aliases(client), *((version.tags, version.description) for version in versions), *map(str, models)]

    before = state()
    decision = promote("", tiny_data_uri, run, dry_run=True)
    assert (decision.version, decision.promoted) == ("2", True), "empty is the newest"
    assert decision.reason.startswith("dry run, nothing changed: promoted: better")
    assert "2.00 dB against the champion's 1.00" not in decision.reason, "which it measured anew"
    assert state() == before


def test_a_candidate_that_was_measured_otherwise_is_measured_too(run: StepRun, tiny_data_uri: str) -> None:
    number = registered(run, tiny_data_uri, delta_psnr_t4=99.0)
    run.client.set_model_version_tag("genie", number, "measured_on", "elsewhere")
    assert "99.00" not in promote(number, tiny_data_uri, run).reason
    with pytest.raises(ValueError, match="no version 7 of model 'genie'"):
        promote("7", tiny_data_uri, run)
    with pytest.raises(ValueError, match="'other' has no version yet: run the pipeline video with --model-name other"):
        promote("", tiny_data_uri, run, name="other")


class Overtaken(MlflowClient):  # type: ignore[misc]
    """While it is asked for a version's figures, once, another promotion moves the alias."""

    def __init__(self, to: str) -> None:
        super().__init__()
        self.to = to

    def get_logged_model(self, model_id: str) -> Any:
        if self.to:
            MlflowClient().set_registered_model_alias("genie", "champion", self.to)
            self.to = ""
        return super().get_logged_model(model_id)


@pytest.mark.parametrize(("theirs", "champion", "previous"), [(3.0, "2", None), (1.5, "3", "2")])
def test_of_two_promotions_at_once_the_later_is_measured_against_the_earlier(
    theirs: float, champion: str, previous: str | None, run: StepRun, tiny_data_uri: str
) -> None:
    """Not against the champion that both of them saw first."""
    assert promote(registered(run, tiny_data_uri), tiny_data_uri, run).promoted
    registered(run, tiny_data_uri, delta_psnr_t4=theirs)
    mine = registered(run, tiny_data_uri, delta_psnr_t4=2.0)
    late = StepRun(Overtaken("2"), run.config, run.run_id, run.parent_id)
    assert promote(mine, tiny_data_uri, late).promoted is (champion == mine)
    now = aliases(run.client)
    assert (now["champion"], now.get("previous")) == (champion, previous)


def test_a_move_that_was_cut_short_can_be_gone_back_from(run: StepRun, tiny_data_uri: str) -> None:
    for delta in (1.0, 2.0, 3.0):
        promote(registered(run, tiny_data_uri, delta_psnr_t4=delta), tiny_data_uri, run)
    run.client.set_registered_model_alias("genie", "champion", "2")  # a rollback that ended here
    assert rollback(run.client) == "genie: champion went from version 2 back to 1; previous: none"
    run.client.set_registered_model_alias("genie", "previous", "1")  # as who went back by hand leaves it
    with pytest.raises(ValueError, match="nothing to go back to: version 1 of 'genie' has both aliases"):
        rollback(run.client)


def test_the_champion_is_checked_and_nothing_of_it_changes_but_tags(run: StepRun, tiny_data_uri: str) -> None:
    with pytest.raises(ValueError, match="there is nothing to check"):
        check_champion(tiny_data_uri, run)
    truth = {name: value for name, value in evaluate(TINY, "model", tiny_data_uri).metrics.items() if value == value}
    number = register("model", truth, tiny_data_uri, run)
    run.client.set_registered_model_alias("genie", "champion", number)
    before = str(run.client.get_logged_model(run.client.get_model_version("genie", number).source[8:]).metrics)
    held = check_champion(tiny_data_uri, run)
    assert held.held
    assert held.reason.count("(+0.00 ± ") == 2, "the same model on the same levels"
    tags = run.client.get_model_version("genie", number).tags
    assert (tags["check"], tags["check_reason"]) == ("held", held.reason)
    assert tags["checked_at"].startswith("20")
    run.flush()
    assert run.client.get_run(run.parent_id).data.metrics["rollout_psnr_t1"] == pytest.approx(truth["rollout_psnr_t1"])

    better = truth | {"rollout_psnr_t1": truth["rollout_psnr_t1"] + 99}
    run.client.set_registered_model_alias("genie", "champion", registered(run, tiny_data_uri, **better))
    worse = check_champion(tiny_data_uri, run)
    assert not worse.held
    assert "version 2 is worse than it was: " in worse.reason
    assert run.client.get_model_version("genie", "2").tags["check"] == "worse"
    after = str(run.client.get_logged_model(run.client.get_model_version("genie", number).source[8:]).metrics)
    assert after == before


def test_today_has_levels_of_its_own_and_they_alone_are_collected(tmp_path: Path) -> None:
    today = of_today(TINY)
    first, known = today.data.eval_first_level, TINY.data.eval_first_level
    assert first > known + 1000 * TINY.data.eval_levels
    assert today.with_overrides(f"data.eval_first_level={known}") == TINY
    uri = collect(today, str(tmp_path), splits=("eval",))
    assert VideoStore.open(f"{uri}/eval").num_episodes >= TINY.data.eval_levels
    with pytest.raises(ValueError, match="train"):
        VideoStore.open(f"{uri}/train")


def test_a_version_is_measured_on_its_own_data_where_no_other_is_named(run: StepRun, tiny_data_uri: str) -> None:
    registered(run, tiny_data_uri)
    assert own_data(run, "genie") == "", "the levels of CoinRun can be collected anew"
    for pipeline in ("video", "decoder"):  # the second registers the world again, with a larger decoder
        with step("register", "tiny", root_uri="here", study={"pipeline": pipeline}) as other:
            if pipeline == "video":
                other.dataset(tiny_data_uri)
            Path("model", "note.txt").write_text(pipeline)
            register("model", GOOD, "", other, "genie-video")
            assert own_data(other, "genie-video") == tiny_data_uri
            register("model", GOOD, "", other, f"of-{pipeline}")
    run.client.set_registered_model_alias("of-decoder", "champion", "1")
    with pytest.raises(ValueError, match=r"version 1 of 'of-decoder' does not say .* name it with --data"):
        own_data(run, "of-decoder", alias="champion")


def test_what_is_no_alias_is_no_champion(run: StepRun) -> None:
    with pytest.raises(ValueError, match="no version of 'genie' has the alias 'champion'"):
        rollback(run.client)
    with pytest.raises(MlflowException):
        run.client.get_registered_model("genie")
