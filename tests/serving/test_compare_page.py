"""Versions on the page: one beside the other, another one promoted meanwhile, and the process killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from chromium import EXECUTABLE, Chromium, wait_for
from page_help import PREVIEWED, STEPS, serving, shown, step_to
from play_help import Registry

from genie_model.checkpoint import load_model, save_model
from genie_model.genie import Genie
from serving.engine import Engine
from serving.schemas import ModelVersionInfo

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="no chromium on PATH: install it to test the page")

BESIDE_STEPS = "Number(document.querySelector('#beside .steps').textContent)"
REASON = "document.querySelector('#beside .reason').textContent"
MESSAGE = "document.querySelector('#message').textContent"
FIGURES = "[...document.querySelectorAll('#beside .figures div')].map((row) => row.textContent)"
OPTIONS = "[...document.querySelectorAll('#versions select')].map((list) => [...list.options].map((one) => one.text))"
CHOOSE = """(() => {
  const list = document.querySelectorAll("#versions select")[%d];
  list.value = "%s";
  list.dispatchEvent(new Event("change"));
})()"""


class Measured(Registry):
    """Its versions come with metrics as the pipeline registers them."""

    def versions(self) -> list[ModelVersionInfo]:
        metrics = {"delta_psnr_t1": 1.0, "delta_psnr_t4": 5.81, "delta_psnr_t4_ci95": 0.77, "tokenizer_psnr": 28.96}
        return [one.model_copy(update={"metrics": metrics}) for one in super().versions()]


@pytest.fixture(scope="module")
def registry(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Version 1 is the champion, 3, once more; 2 does not load, and 0 has fewer actions."""
    config = load_model(str(model_folder)).config
    codebook = config.lam.codebook.model_copy(update={"num_codes": 3})
    fewer = config.model_copy(update={"lam": config.lam.model_copy(update={"codebook": codebook})})
    other = tmp_path_factory.mktemp("fewer_actions")
    save_model(str(other), Genie(fewer))
    registry = Measured()
    for number, folder in (("0", other), ("1", model_folder), ("2", tmp_path_factory.mktemp("empty"))):
        registry.known[number] = registry.of(number, folder)
    registry.set_alias("3", model_folder)
    registry.aliases["challenger"] = "1"
    return registry


@pytest.fixture
def service(model_folder: Path, registry: Registry, browser: Chromium) -> Iterator[tuple[str, Engine]]:
    """Nothing may be on the console in the end."""
    with serving(model_folder, registry=registry, poll_seconds=0.05) as running:
        yield running
        browser.send("Page.navigate", url="about:blank")
    assert browser.errors == []


def opened(page: Chromium, url: str) -> None:
    page.open(url)
    page.wait_until(PREVIEWED)


def together(page: Chromium, steps: int) -> None:
    """Both worlds come to that step, and show the same: here they are of the same weights."""
    page.wait_until(f"{STEPS} === {steps} && {BESIDE_STEPS} === {steps} && {REASON} === ''")
    assert (shown(page) == shown(page, "beside")).all()


def expect_refusal(page: Chromium, status: int) -> None:
    """The browser itself notes every answer that is none."""
    assert len(page.errors) == 1
    assert f"status of {status}" in page.errors.pop()


def test_two_versions_take_the_same_actions_from_the_same_prompt(
    service: tuple[str, Engine], browser: Chromium
) -> None:
    url, engine = service
    opened(browser, f"{url}/?version=champion&beside=1")
    together(browser, 0)
    assert browser.evaluate(OPTIONS) == [
        ["3 · champion", "2", "1 · challenger", "0"],
        ["nothing", "3 · champion", "2", "1 · challenger", "0"],
    ]
    names = browser.evaluate("[...document.querySelectorAll('.version')].map((name) => name.textContent)")
    assert names == ["genie · version 3", "genie · version 1"]
    assert browser.evaluate(FIGURES) == ["Δ45.8 ± 0.8 dB", "tokenizer29.0 dB"]
    for steps, key in enumerate("2143", start=1):
        step_to(browser, key, steps)
        together(browser, steps)
    browser.key_down("2")
    browser.wait_until(f"{STEPS} >= 8")
    browser.key_up("2")
    browser.wait_until(PREVIEWED)
    together(browser, browser.evaluate(STEPS))
    for figure in ("rate", "latency"):
        numbers = browser.evaluate(f"[...document.querySelectorAll('.{figure}')].map((one) => Number(one.textContent))")
        assert min(numbers) > 0

    for _ in range(2):
        browser.press("ArrowLeft")
    past = browser.evaluate(STEPS)
    together(browser, past)
    before = list(engine._sessions)
    step_to(browser, "4", past + 1)
    together(browser, past + 1)
    wait_for(lambda: engine.num_sessions == 2 and not {*before} & {*engine._sessions}, "both to have branched", 10)
    played, beside = engine._sessions.values()
    assert {played.model.info.version, beside.model.info.version} == {"3", "1"}
    assert (played.steps, played.seed, played.sampling) == (beside.steps, beside.seed, beside.sampling)
    assert (shown(browser) == played.picture.frame_HWC).all()
    browser.evaluate("document.querySelector('#beside-film [data-t=\"0\"]').click()")
    together(browser, 0)
    browser.press("R")
    together(browser, 0)


def test_versions_are_chosen_on_the_page(service: tuple[str, Engine], browser: Chromium) -> None:
    url, engine = service
    opened(browser, url)
    assert browser.evaluate("document.querySelector('#beside').hidden")
    step_to(browser, "2", 1)
    browser.evaluate(CHOOSE % (1, "1"))
    browser.wait_until("location.search === '?beside=1'")
    together(browser, 0)
    browser.evaluate(CHOOSE % (0, "1"))
    browser.wait_until("document.querySelector('#played .version').textContent === 'genie · version 1'")
    assert browser.evaluate("location.search") == "?beside=1&version=1"
    browser.evaluate(CHOOSE % (1, ""))
    browser.wait_until("document.querySelector('#beside').hidden && location.search === '?version=1'")
    browser.wait_until(PREVIEWED)
    wait_for(lambda: engine.num_sessions == 1, "what was left to end", 10)


@pytest.mark.parametrize(
    ("version", "status", "words"),
    [("9", 404, "no version 9"), ("2", 503, "version 2 does not work"), ("0", None, "3 actions and version 3 has 4")],
)
def test_what_cannot_be_played_beside_says_why_and_leaves_the_first_playable(
    version: str, status: int | None, words: str, service: tuple[str, Engine], browser: Chromium
) -> None:
    url, engine = service
    opened(browser, f"{url}/?beside={version}")
    browser.wait_until(f"{REASON}.includes({words!r})")
    step_to(browser, "2", 1)
    browser.wait_until(PREVIEWED)
    wait_for(lambda: engine.num_sessions == 1, "the second session to end", 10)
    if status:
        expect_refusal(browser, status)


def test_a_second_world_that_ends_leaves_the_first_playable(service: tuple[str, Engine], browser: Chromium) -> None:
    url, engine = service
    opened(browser, f"{url}/?beside=1")
    step_to(browser, "2", 1)
    together(browser, 1)
    (ended,) = (session.id for session in engine._sessions.values() if session.model.info.version == "1")
    browser.evaluate(f"fetch('v1/sessions/{ended}', {{ method: 'DELETE' }}).then(() => null)")
    step_to(browser, "2", 2)
    browser.wait_until(f"{REASON}.includes('has ended')")
    step_to(browser, "2", 3)
    browser.press("R")  # both anew
    together(browser, 0)
    assert browser.evaluate(REASON) == ""
    assert all("404" in error for error in browser.errors)
    browser.errors.clear()


def test_a_version_that_is_promoted_meanwhile_waits_for_the_next_world(model_folder: Path, browser: Chromium) -> None:
    registry = Registry()
    registry.set_alias("1", model_folder)
    with serving(model_folder, registry=registry, poll_seconds=0.05) as (url, engine):
        opened(browser, url)
        assert browser.evaluate("document.querySelector('#versions').hidden")  # there is nothing to choose from
        step_to(browser, "2", 1)
        registry.set_alias("2", model_folder)
        wait_for(lambda: engine.model.info.version == "2", "the new champion", 10)
        browser.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        browser.wait_until(f"{MESSAGE} === 'genie · version 2 is here: Restart plays it.'")
        assert browser.evaluate(OPTIONS)[0] == ["2 · champion", "1"]
        step_to(browser, "2", 2)
        browser.wait_until(PREVIEWED)
        (session,) = engine._sessions.values()
        assert (session.model.info.version, session.steps) == ("1", 2)
        browser.press("R")
        browser.wait_until("document.querySelector('.version').textContent === 'genie · version 2'")
        step_to(browser, "2", 1)
        browser.wait_until(PREVIEWED)
        browser.send("Page.navigate", url="about:blank")
    assert browser.errors == []


@contextmanager
def process(model_folder: Path, store: Path, port: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`python -m serving`, and where it says that it can be played."""
    command = [sys.executable, "-m", "serving", f"--model-uri={model_folder}", f"--port={port}"]
    running = subprocess.Popen(
        [*command, f"--session-store={store}"], stdout=subprocess.PIPE, text=True, env={**os.environ, "NO_COLOR": "1"}
    )
    try:
        assert running.stdout
        line = next(line for line in running.stdout if "play at" in line)
        yield running, next(word for word in line.split() if word.startswith("http"))
    finally:
        running.kill()
        running.wait(timeout=20)


def test_play_goes_on_where_it_was_after_the_process_was_killed(
    model_folder: Path, browser: Chromium, tmp_path: Path
) -> None:
    store = tmp_path / "sessions.db"
    with process(model_folder, store, 0) as (running, url):
        opened(browser, url)
        for steps in range(1, 4):
            step_to(browser, "2", steps)
        browser.wait_until(PREVIEWED)
        before = shown(browser)
        running.send_signal(signal.SIGKILL)
        running.wait(timeout=20)
    browser.press("3")
    browser.wait_until(f"{MESSAGE}.includes('Trying again')")
    assert (shown(browser) == before).all()
    with process(model_folder, store, int(url.rpartition(":")[2])):
        browser.wait_until(f"{STEPS} === 4", 30)  # by itself, and the action that met nobody is taken
        assert browser.evaluate(MESSAGE) == "The service is back."
        browser.wait_until(PREVIEWED)
        step_to(browser, "1", 5)
        browser.press("ArrowLeft")
        browser.press("ArrowLeft")
        assert (shown(browser) == before).all()
        browser.send("Page.navigate", url="about:blank")
    assert all("ERR_CONNECTION_REFUSED" in error for error in browser.errors), browser.errors
