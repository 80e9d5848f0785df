"""The launcher, over HTTP: the real client, a cluster of one process behind it, and pods that are real processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_cluster import Allowed, FakeCluster, running

from components.launch import launch as launch_component
from genie_model import jobset_client, launcher
from genie_model.checkpoint import load_tokenizer
from genie_model.launcher import Job, JobError, launch

ROOT = Path(__file__).parents[2]
ROLES = ROOT / "manifests" / "base" / "rbac.yaml"
ALLOWED: Allowed = {
    ("create", "jobsets"),
    ("get", "jobsets"),
    ("delete", "jobsets"),
    ("list", "pods"),
    ("get", "pods/log"),
}
IMAGE = f"genie.example/genie-train-tpu@sha256:{0:064}"
ONE_HOST = Job(image=IMAGE, accelerator="tpu-v6e", topology="2x4")
FOUR_HOSTS = Job(image=IMAGE, accelerator="tpu-v5e", topology="4x4", max_restarts=0)
# `tiny` is of a batch and an optimizer that a slice does not take.
FITS = ["train_tokenizer.batch_size=16", "train_tokenizer.optimizer.muon_lr=0"]
URI = "models/tokenizer-1"
LEAVES = f"echo trained; leave {URI}"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with running(ALLOWED, tmp_path) as (cluster, kubeconfig):
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        yield cluster


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Future[str]]]:
    """A launcher in a thread: `launch` with these changes."""
    with ThreadPoolExecutor() as threads:

        def begin(job: Job = FOUR_HOSTS, **changes: Any) -> Future[str]:
            return threads.submit(launched, tmp_path, job, **changes)

        yield begin


def launched(root: Path, job: Job = FOUR_HOSTS, **changes: Any) -> str:
    what = {"stage": "train-tokenizer", "preset": "tiny", "overrides": FITS, "root_uri": str(root), "data_uri": "data"}
    return launch(job, **what | {"poll_seconds": 0.1} | changes)


def process(root: Path) -> subprocess.Popen[str]:
    """A launcher in a process of its own."""
    program = f"""if True:
        from genie_model.launcher import Job, launch
        job = Job.model_validate_json('{FOUR_HOSTS.model_dump_json()}')
        print(launch(job, "train-tokenizer", "tiny", {FITS}, root_uri="{root}", data_uri="data", poll_seconds=0.1))"""
    return subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout
    assert any(text in line for line in process.stdout), f"it ended without {text!r}"


def test_training_is_preempted_carries_on_and_its_model_comes_back(
    cluster: FakeCluster, start: Callable[..., Future[str]], tiny_data_uri: str, tmp_path: Path
) -> None:
    """The real command, on the CPU."""
    steps = ["train_tokenizer.steps=150", "train_tokenizer.checkpoint_every=20", "train_tokenizer.precision=fp32"]
    on_cpu = ["parallel.backend=native", "parallel.fsdp=1", "parallel.tensor=1", FITS[1]]
    found = start(ONE_HOST, overrides=[*steps, *on_cpu], data_uri=tiny_data_uri)
    cluster.wait_for(lambda: found.done() or list(tmp_path.glob("training/*/*")), 60)
    cluster.preempt(0)
    model_uri = found.result(120)
    assert load_tokenizer(model_uri)
    assert Path(model_uri).parent == tmp_path / "models"
    assert cluster.printed("carried on from step")
    (body,) = cluster.job_sets.values()
    assert (body["status"]["restarts"], body["status"]["restartsCountTowardsMax"]) == (1, 0)


def test_all_hosts_run_and_the_first_one_is_shown(
    cluster: FakeCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.program = lambda host, attempt: f"echo host $TPU_WORKER_ID trains; sleep 0.5; {LEAVES}"
    what = {"root_uri": str(tmp_path), "data_uri": "data", "tracking_uri": "", "experiment": "genie", "overrides": FITS}
    found = launch_component.python_func("train-tokenizer", FOUR_HOSTS.model_dump(), "tiny", **what)
    assert found == URI
    assert len(cluster.pods) == 4
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("[")] == ["host 0 trains", "trained"]
    (name,) = cluster.job_sets
    assert lines[0] == f"[{name}] JobSet created"
    assert f"[{name}] all 4 hosts run" in lines


def test_a_failure_starts_all_hosts_again_and_then_tells_why(
    cluster: FakeCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.program = lambda host, attempt: f"echo start {attempt}; {'exit 3' if host == 2 else 'exec sleep 60'}"
    with pytest.raises(JobError) as failed:
        launched(tmp_path, FOUR_HOSTS.model_copy(update={"max_restarts": 1}))
    assert failed.value.exit_code == 3
    assert "-2-00001 exited with 3; the last lines of its log:\nstart 1" in str(failed.value)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith("starts again, for the 1. time; 1 of 1 failures count") for line in lines)
    assert sum("-hosts-0-2-" in line and "exited with 3" in line for line in lines) == 2
    assert all(pod.process and pod.process.wait(10) != 0 for pod in cluster.pods.values()), "none of them goes on"


def test_an_error_of_the_user_s_is_not_tried_again(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.program = lambda host, attempt: "echo no such data; exit 2"
    with pytest.raises(JobError, match="no such data") as failed:
        launched(tmp_path, FOUR_HOSTS.model_copy(update={"max_restarts": 5}))
    assert failed.value.exit_code == 2
    assert {pod.attempt for pod in cluster.pods.values()} == {0}


@pytest.mark.parametrize("ends", ["exec sleep 60", "trap 'kill $!; exit 7' TERM; sleep 60 > /dev/null & wait"])
def test_a_host_that_is_taken_away_is_no_failure(
    cluster: FakeCluster, start: Callable[..., Future[str]], capsys: pytest.CaptureFixture[str], ends: str
) -> None:
    """However the process ends: by the signal, or with a code of its own."""
    cluster.program = lambda host, attempt: LEAVES if attempt else f"echo begun; {ends}"
    found = start()
    cluster.wait_for(lambda: all(cluster.printed("begun", host) for host in range(4)))
    cluster.preempt(3)
    assert found.result(30) == URI
    assert "starts again, for the 1. time; 0 of 0 failures count" in capsys.readouterr().out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_launcher_that_is_stopped_deletes_its_job(
    cluster: FakeCluster, tmp_path: Path, number: int, code: int
) -> None:
    cluster.program = lambda host, attempt: "echo begun; exec sleep 60"
    with process(tmp_path) as stopped:
        read_until(stopped, "begun")
        processes = [pod.process for pod in cluster.pods.values()]
        stopped.send_signal(number)
        assert stopped.wait(30) == code
    assert cluster.job_sets == cluster.pods == {}
    assert all(each and each.poll() is not None for each in processes)


def test_a_launcher_that_was_killed_is_followed_by_one_that_goes_on(
    cluster: FakeCluster, start: Callable[..., Future[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go = tmp_path / "go"
    cluster.program = lambda host, attempt: f"echo begun; until [ -e {go} ]; do sleep 0.05; done; {LEAVES}"
    with process(tmp_path) as killed:
        read_until(killed, "begun")
        killed.kill()
    processes = {pod.name: pod.process for pod in cluster.pods.values()}
    found = start()
    assert cluster.seen()
    go.touch()
    assert found.result(30) == URI
    assert {pod.name: pod.process for pod in cluster.pods.values()} == processes
    output = capsys.readouterr().out
    assert "goes on with the JobSet that was started before" in output
    assert output.count("trained") == 1


def test_settings_that_differ_do_not_share_a_job(
    cluster: FakeCluster, start: Callable[..., Future[str]], tmp_path: Path
) -> None:
    cluster.program = lambda host, attempt: "exec sleep 60"
    first = start()
    cluster.wait_for(lambda: cluster.pods)
    with pytest.raises(ValueError, match="trains this already, with another image or other settings: wait for it, or"):
        launched(tmp_path, FOUR_HOSTS.model_copy(update={"image": IMAGE.replace("0", "1")}))
    assert not first.done()
    with cluster.changed:
        cluster.delete(next(iter(cluster.job_sets)))
    with pytest.raises(JobError, match="deleted by somebody"):
        first.result(30)


def test_what_is_done_is_not_done_again(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.program = lambda host, attempt: LEAVES
    assert launched(tmp_path) == URI
    cluster.program = lambda host, attempt: "leave models/other"
    assert launched(tmp_path) == URI
    other_image = FOUR_HOSTS.model_copy(update={"image": IMAGE.replace("0", "1")})
    assert launched(tmp_path, other_image) == "models/other", "it is other code"
    next(tmp_path.glob("results/*")).unlink()
    cluster.program = lambda host, attempt: LEAVES
    assert launched(tmp_path, other_image) == URI, "it had left no result"


def test_what_failed_is_made_anew(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.program = lambda host, attempt: "exit 2"
    with pytest.raises(JobError):
        launched(tmp_path)
    cluster.program = lambda host, attempt: LEAVES
    assert launched(tmp_path) == URI


def test_what_would_fail_again_is_not_tried_again_by_the_same_pipeline_run(
    cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kubeflow tries any step again that failed, whatever its exit code."""
    cluster.program = lambda host, attempt: "echo no such data; exit 2"
    monkeypatch.setenv("GENIE_PIPELINE_RUN", "run-1")
    said = []
    for _ in range(2):
        with pytest.raises(JobError) as failed:
            launched(tmp_path)
        assert failed.value.exit_code == 2
        said.append(str(failed.value))
    assert said[0] == said[1]
    assert capsys.readouterr().out.count("JobSet created") == 1
    monkeypatch.setenv("GENIE_PIPELINE_RUN", "run-2")
    cluster.program = lambda host, attempt: "exit 3"
    once = FOUR_HOSTS.model_copy(update={"max_restarts": 0})
    with pytest.raises(JobError):
        launched(tmp_path, once)
    cluster.program = lambda host, attempt: LEAVES
    assert launched(tmp_path, once) == URI, "what failed too often may go better"


def test_other_data_at_the_same_place_is_trained_on_anew(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.program = lambda host, attempt: LEAVES
    assert launched(tmp_path, data_digest="1") == URI
    cluster.program = lambda host, attempt: "leave models/other"
    assert launched(tmp_path, data_digest="2") == "models/other"
    assert launched(tmp_path, data_digest="1") == URI


def test_a_step_that_fails_says_so_without_a_traceback(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.program = lambda host, attempt: "echo no such data; exit 2"
    where = {
        "root_uri": str(tmp_path),
        "data_uri": "data",
        "tracking_uri": "",
        "experiment": "genie",
        "overrides": FITS,
    }
    job = FOUR_HOSTS.model_dump()
    with pytest.raises(SystemExit, match=r"\[launch\] error: JobSet train-tokenizer-.* failed(.|\n)*no such data"):
        launch_component.python_func("train-tokenizer", job, "tiny", **where)
    with pytest.raises(SystemExit, match=r"\[launch\] error: unknown preset 'tinny'"):
        launch_component.python_func("train-tokenizer", job, "tinny", **where)


def test_a_job_without_a_result_is_a_failure(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.program = lambda host, attempt: LEAVES
    launched(tmp_path)
    cluster.job_sets.clear()  # as a day later
    cluster.program = lambda host, attempt: "echo nothing"
    with pytest.raises(JobError, match="left no result"):
        launched(tmp_path)


def test_connections_that_break_lose_and_repeat_no_line(
    cluster: FakeCluster, start: Callable[..., Future[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.program = lambda host, attempt: f"for i in $(seq 40); do echo line $i; sleep 0.05; done; {LEAVES}"
    cluster.broken, cluster.away, cluster.cut = 2, 1, 0.3
    found = start(ONE_HOST)
    while not found.done():
        cluster.broken = 2
        time.sleep(0.4)
    assert found.result() == URI
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("line")]
    assert lines == [f"line {i}" for i in range(1, 41)]


def test_an_api_server_that_stays_away_is_given_up(
    cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobset_client, "_PATIENCE", 1.5)
    cluster.away = 10**6
    with pytest.raises(ConnectionError, match="away for 2 s: 503"):
        launched(tmp_path)


def test_it_is_told_why_hosts_are_waited_for(
    cluster: FakeCluster,
    start: Callable[..., Future[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(launcher, "_UNPLACED_SECONDS", 0.0)
    cluster.full = "0/3 nodes are available: 3 Insufficient google.com/tpu"
    cluster.program = lambda host, attempt: LEAVES
    found = start()
    cluster.wait_for(lambda: len(cluster.pods) == 4)
    assert cluster.seen(times=2)  # and has told of what it saw
    cluster.full = ""
    cluster.place()
    assert found.result(30) == URI
    reasons = [line for line in capsys.readouterr().out.splitlines() if "nodes are available" in line]
    assert len(reasons) == 1
    assert "waits for 4 hosts: nodes: 0/3 nodes are available" in reasons[0]


def test_a_job_that_takes_too_long_is_ended(cluster: FakeCluster, start: Callable[..., Future[str]]) -> None:
    cluster.program = lambda host, attempt: "exec sleep 60"
    found = start()
    cluster.wait_for(lambda: cluster.pods)
    for body in cluster.job_sets.values():
        body["metadata"]["creationTimestamp"] = "2020-01-01T00:00:00Z"
    with pytest.raises(TimeoutError, match="took longer than its 1209600 s and was deleted"):
        found.result(30)
    cluster.wait_for(lambda: not cluster.job_sets)


def test_a_cluster_that_refuses_is_one_line(cluster: FakeCluster, tmp_path: Path) -> None:
    def refuse(body: dict[str, Any]) -> None:
        raise ValueError(
            'strict decoding error: unknown field "spec.failurePolicy.rules[0].onJobFailureMessagePatterns"'
        )

    cluster.check = refuse
    with pytest.raises(
        ValueError, match=r"refuses JobSet train-tokenizer-.*unknown field.*JobSet must be 0\.10 or newer"
    ):
        launched(tmp_path)
    cluster.allowed = ALLOWED - {("create", "jobsets")}
    with pytest.raises(PermissionError, match=r"cannot create resource.*bind Role genie-launcher of namespace genie"):
        launched(tmp_path)
    with pytest.raises(PermissionError):
        launched(tmp_path, FOUR_HOSTS.model_copy(update={"namespace": "other"}))


def test_without_a_cluster_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no cluster to ask: set KUBECONFIG"):
        launched(tmp_path)


def test_it_asks_for_all_that_its_role_allows(cluster: FakeCluster, start: Callable[..., Future[str]]) -> None:
    cluster.program = lambda host, attempt: "exit 2" if host == 1 else "exec sleep 60"
    with pytest.raises(JobError):
        start().result(30)
    cluster.program = lambda host, attempt: LEAVES
    assert start().result(30) == URI  # what failed is deleted first
    assert cluster.used == ALLOWED


@pytest.mark.skipif(not ROLES.exists(), reason="manifests/base/rbac.yaml is not here")
def test_its_role_allows_no_more() -> None:
    (role,) = (
        o
        for o in yaml.safe_load_all(ROLES.read_text())
        if o and o["metadata"]["name"] == "genie-launcher" and o["kind"] == "Role"
    )
    allowed = {(verb, resource) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    groups = {resource: rule["apiGroups"] for rule in role["rules"] for resource in rule["resources"]}
    assert allowed == ALLOWED
    assert groups == {"jobsets": ["jobset.x-k8s.io"], "pods": [""], "pods/log": [""]}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"stage": "collect"}, "stage 'collect' cannot be launched: allowed are train-tokenizer, train-world"),
        ({"preset": "tinny"}, "tiny"),
        ({"overrides": ["seed=many"]}, "seed"),
        ({"overrides": ["parallel.fsdp=3"]}, "devices are asked for, and there are 16"),
        ({"overrides": ["train_tokenizer.batch_size=4"]}, "tensor=4 must divide the heads"),
        ({"overrides": FITS[:1]}, "optimizer.muon_lr: torch-xla hands"),
        ({"overrides": ["parallel.fsdp=16", "parallel.tensor=1"]}, "data.fsdp=16 must divide batch_size=2"),
    ],
)
def test_what_can_never_work_reaches_no_cluster(
    cluster: FakeCluster, tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        launched(tmp_path, **changes)
    assert cluster.used == set()


def test_a_run_of_kubeflow_s_is_passed_on(
    cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.program = lambda host, attempt: f"env | grep MLFLOW_; {LEAVES}"
    monkeypatch.setenv("MLFLOW_RUN_ID", "given")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    launched(tmp_path, ONE_HOST)
    assert cluster.printed("MLFLOW_RUN_ID=given")
    assert "secret" not in str(cluster.job_sets)
    monkeypatch.setenv("MLFLOW_RUN_ID", "that of another try")
    assert launched(tmp_path, ONE_HOST) == URI
    assert len(cluster.pods) == 1


def test_chips_that_the_batch_leaves_over_share_the_heads(cluster: FakeCluster, tmp_path: Path) -> None:
    """The paper's case study on sixteen chips: a batch of 36 is shared by four of them."""
    cluster.program = lambda host, attempt: LEAVES
    for stage, mesh in (("train-tokenizer", (16, 1)), ("train-world", (4, 4))):
        launched(tmp_path, stage=stage, preset="coinrun", overrides=[], tokenizer_uri="tokenizer")
        name = next(name for name in cluster.job_sets if name.startswith(stage))
        pods = cluster.job_sets[name]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        command = pods["containers"][0]["command"]
        assert {f"--set=parallel.fsdp={mesh[0]}", f"--set=parallel.tensor={mesh[1]}"} <= set(command)
