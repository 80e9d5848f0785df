"""A cluster of one process: an API server over HTTP, and behind it what JobSet, Job and kubelet do to a JobSet.

Pods are processes of this machine that run their container's command, so a job really trains. Of a JobSet's policies
the rules are obeyed as they are written in it. Who asks for what the role does not allow is refused.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

ROOT = Path(__file__).parents[2]
TOKEN = "a-token"
JOB_SETS = re.compile(r"/apis/jobset\.x-k8s\.io/v1alpha2/namespaces/([^/]+)/jobsets(?:/([^/]+))?")
PODS = re.compile(r"/api/v1/namespaces/([^/]+)/pods(?:/([^/]+)/(log))?")
# For a script: leaves its argument where the launcher looks for the result.
LEAVES = """args="$*"; leave() { r=${args#*--result=}; r=${r%% *}; mkdir -p ${r%/*}; printf %s "$1" > $r; }; """
Allowed = set[tuple[str, str]]  # verb, resource


def now(fraction: bool = False) -> str:
    at = datetime.now(UTC)
    return f"{at:%Y-%m-%dT%H:%M:%S}" + (f".{time.time_ns() % 10**9:09}Z" if fraction else "Z")


class Pod:
    """A process, and what kubelet tells of it."""

    def __init__(self, cluster: FakeCluster, body: dict[str, Any], host: int, attempt: int, name: str) -> None:
        self.cluster, self.spec, self.host, self.attempt, self.name = cluster, body["spec"], host, attempt, name
        labels = body["metadata"]["labels"] | {"batch.kubernetes.io/job-completion-index": str(host)}
        self.labels = labels | {"jobset.sigs.k8s.io/jobset-name": name.partition("-hosts-")[0]}
        self.labels |= {"jobset.sigs.k8s.io/restart-attempt": str(attempt)}
        self.phase, self.conditions, self.terminated = "Pending", list[dict[str, Any]](), dict[str, Any]()
        self.lines = list[str]()  # each behind its time
        self.process: subprocess.Popen[str] | None = None
        self.made = now()

    def run(self) -> None:
        container = self.spec["containers"][0]
        given = {each["name"]: each["value"] for each in container["env"]}
        # as GKE's webhook does for pods that ask for google.com/tpu
        given |= {"TPU_WORKER_ID": str(self.host), "TPU_WORKER_HOSTNAMES": "host-0,host-1"}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        script = self.cluster.program(self.host, self.attempt)
        self.process = subprocess.Popen(
            ["bash", "-c", LEAVES + script, *container["command"]] if script else container["command"],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": path} | given,
            cwd=self.cluster.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.phase = "Running"
        threading.Thread(target=self._wait, args=(self.process,), daemon=True).start()

    def _wait(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        for line in process.stdout:
            with self.cluster.changed:
                self.lines.append(f"{now(fraction=True)} {line.rstrip()}")
                self.cluster.changed.notify_all()
        code = process.wait()
        with self.cluster.changed:
            code = code if code >= 0 else 128 - code
            self.phase = "Failed" if code else "Succeeded"
            reason = "Error" if code else "Completed"
            self.terminated = {"exitCode": code, "reason": reason, "finishedAt": now(), "startedAt": self.made}
            self.cluster.ended(self)
            self.cluster.changed.notify_all()

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)

    def body(self) -> dict[str, Any]:
        state = {"terminated": self.terminated} if self.terminated else {"running": {"startedAt": self.made}}
        status = {"name": "train", "image": "i", "imageID": "i", "ready": True, "restartCount": 0, "state": state}
        unplaced = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": self.cluster.full}
        pending = self.phase == "Pending"
        return {
            "metadata": {"name": self.name, "labels": self.labels, "creationTimestamp": self.made},
            "spec": self.spec,
            "status": {
                "phase": self.phase,
                "conditions": self.conditions + ([unplaced] if pending else []),
                "containerStatuses": [] if pending else [status],
            },
        }


class FakeCluster:
    """`program` has the script that a host runs at the how-manieth start, where it is not the container's command.

    `full` is why no node can be had, while that is so; `broken` connections are dropped, `away` requests refused with
    503, and every stream of a log is cut after `cut` seconds.
    """

    def __init__(self, allowed: Allowed, folder: Path) -> None:
        self.allowed, self.used, self.folder = allowed, Allowed(), folder
        self.program: Callable[[int, int], str] = lambda host, attempt: ""
        self.full, self.broken, self.away, self.cut = "", 0, 0, 1e9
        self.looks = 0  # at the pods of a job
        self.job_sets, self.pods = dict[str, dict[str, Any]](), dict[str, Pod]()
        self.check: Callable[[dict[str, Any]], object] = lambda body: None  # raises ValueError where it is none
        self.changed = threading.Condition(threading.RLock())
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler(self))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    # What controllers do; all of it under `changed`

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        self.check(body)
        body["metadata"] |= {"uid": "u", "creationTimestamp": now()}
        body["status"] = {"restarts": 0, "restartsCountTowardsMax": 0, "conditions": []}
        self.job_sets[body["metadata"]["name"]] = body
        self._start_pods(body)
        return body

    def _start_pods(self, body: dict[str, Any]) -> None:
        (job,) = body["spec"]["replicatedJobs"]
        name, attempt, spec = body["metadata"]["name"], body["status"]["restarts"], job["template"]["spec"]
        for host in range(spec["completions"]):
            pod = Pod(self, spec["template"], host, attempt, f"{name}-{job['name']}-0-{host}-{attempt:05}")
            self.pods[pod.name] = pod
        self.place()

    def place(self) -> None:
        """Runs what is pending, if there are nodes."""
        with self.changed:
            for pod in () if self.full else self.pods.values():
                if pod.phase == "Pending":
                    pod.run()
            self.changed.notify_all()

    def ended(self, pod: Pod) -> None:
        """Job and JobSet look at a pod that ended."""
        body = self.job_sets.get(pod.labels["jobset.sigs.k8s.io/jobset-name"])
        if body is None or pod.attempt != body["status"]["restarts"] or self.pods.get(pod.name) is not pod:
            return
        status, pods = body["status"], [p for p in self.pods.values() if p.attempt == pod.attempt]
        if status.get("terminalState") or "deletionTimestamp" in body["metadata"]:
            return
        if body.get("failed") == pod.attempt:
            return
        if all(each.phase == "Succeeded" for each in pods):
            self._end(body, "Completed", "jobset completed successfully", "AllJobsCompleted")
        if pod.phase != "Failed":
            return
        body["failed"] = pod.attempt  # those that are stopped for it do not count
        reason, message = self._job_failure(body, pod)
        action, why = self._action(body, reason, message), "FailJobSetFailurePolicyAction"
        if action == "RestartJobSet":
            if status["restartsCountTowardsMax"] >= body["spec"]["failurePolicy"]["maxRestarts"]:
                action, why = "FailJobSet", "ReachedMaxRestarts"
            else:
                status["restartsCountTowardsMax"] += 1
        for each in pods:
            each.stop()
        if action == "FailJobSet":
            return self._end(body, "Failed", f"jobset failed due to one or more job failures: {message}", why)
        threading.Thread(target=self._restart, args=(body, pods), daemon=True).start()
        return None

    def _job_failure(self, body: dict[str, Any], pod: Pod) -> tuple[str, str]:
        """Reason and message, as the controller of Jobs words them."""
        spec, code = body["spec"]["replicatedJobs"][0]["template"]["spec"], pod.terminated["exitCode"]
        for index, rule in enumerate(spec["podFailurePolicy"]["rules"]):
            matching = f"matching {rule['action']} rule at index {index}"
            if code in rule.get("onExitCodes", {}).get("values", []):
                return (
                    "PodFailurePolicy",
                    f"Container train for pod genie/{pod.name} failed with exit code {code} {matching}",
                )
            for condition in rule.get("onPodConditions", []):
                if any(condition["type"] == each["type"] for each in pod.conditions):
                    said = f"Pod genie/{pod.name} has condition {condition['type']} {matching}"
                    return "PodFailurePolicy", said
        return "BackoffLimitExceeded", "Job has reached the specified backoff limit"

    def _action(self, body: dict[str, Any], reason: str, message: str) -> str:
        for rule in body["spec"]["failurePolicy"]["rules"]:
            patterns = rule.get("onJobFailureMessagePatterns", [])
            if reason in rule["onJobFailureReasons"] and (not patterns or any(re.search(p, message) for p in patterns)):
                return str(rule["action"])
        return "RestartJobSet"

    def _restart(self, body: dict[str, Any], pods: list[Pod]) -> None:
        for pod in pods:
            if pod.process:
                pod.process.wait()
        self.seen(seconds=10)  # a controller's round takes longer than a launcher's
        with self.changed:
            if "deletionTimestamp" in body["metadata"]:
                return
            for pod in pods:
                self.pods.pop(pod.name, None)
            body["status"]["restarts"] += 1
            self._start_pods(body)

    def _end(self, body: dict[str, Any], state: str, message: str, reason: str) -> None:
        condition = {"type": state, "status": "True", "message": message, "reason": reason}
        body["status"] |= {"terminalState": state, "conditions": [condition | {"lastTransitionTime": now()}]}

    def delete(self, name: str) -> None:
        """In the foreground: what it owns goes first."""
        self.job_sets[name]["metadata"]["deletionTimestamp"] = now()
        mine = [pod for pod in self.pods.values() if pod.labels["jobset.sigs.k8s.io/jobset-name"] == name]

        def finish() -> None:
            for pod in mine:
                pod.stop()
            for pod in mine:
                if pod.process:
                    pod.process.wait()
            with self.changed:
                for pod in mine:
                    self.pods.pop(pod.name, None)
                del self.job_sets[name]
                self.changed.notify_all()

        threading.Thread(target=finish, daemon=True).start()

    def preempt(self, host: int) -> None:
        """A node is taken away: kubelet tells of it, and ends what runs there."""
        with self.changed:
            (pod,) = [pod for pod in self.pods.values() if pod.host == host and pod.phase == "Running"]
            about = {"reason": "TerminationByKubelet", "message": "Pod was terminated in response to node shutdown"}
            pod.conditions.append({"type": "DisruptionTarget", "status": "True", "lastTransitionTime": now(), **about})
            pod.stop()

    # What tests look at

    def wait_for(self, what: Callable[[], object], seconds: float = 30) -> None:
        until = time.monotonic() + seconds
        while True:
            with self.changed:
                if what():
                    return
            assert time.monotonic() < until, "it did not come to that"
            time.sleep(0.02)

    def seen(self, times: int = 1, seconds: float = 30) -> bool:
        """Waits until a launcher has looked at the pods as they are now; whether it did."""
        enough, until = self.looks + times, time.monotonic() + seconds
        while self.looks < enough and time.monotonic() < until:
            time.sleep(0.02)
        return self.looks >= enough

    def printed(self, text: str, host: int = 0) -> bool:
        return any(text in line for pod in self.pods.values() if pod.host == host for line in pod.lines)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        for pod in self.pods.values():
            pod.stop(signal.SIGKILL)


def handler(cluster: FakeCluster) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer("get")

        def do_POST(self) -> None:
            self._answer("create")

        def do_DELETE(self) -> None:
            self._answer("delete")

        def _answer(self, verb: str) -> None:
            url, query = urlsplit(self.path), parse_qs(urlsplit(self.path).query)
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if cluster.broken > 0:
                cluster.broken -= 1
                self.close_connection = True
                return
            if cluster.away > 0:
                cluster.away -= 1
                return self._fail(503, "the server is currently unable to handle the request")
            if self.headers["Authorization"] != f"Bearer {TOKEN}":
                return self._fail(401, "Unauthorized")
            of_job_sets, of_pods = JOB_SETS.fullmatch(url.path), PODS.fullmatch(url.path)
            namespace, name, *part = (of_job_sets or of_pods).groups()  # type: ignore[union-attr]
            resource = "jobsets" if of_job_sets else "pods/log" if part == ["log"] else "pods"
            verb = "list" if verb == "get" and not name else verb
            if namespace != "genie" or (verb, resource) not in cluster.allowed:
                return self._fail(
                    403, f'{resource} is forbidden: User cannot {verb} resource in namespace "{namespace}"'
                )
            cluster.used.add((verb, resource))
            if resource == "pods/log":
                return self._log(name, query)
            with cluster.changed:
                if resource == "pods":
                    cluster.looks += 1
                    key, _, value = query["labelSelector"][0].partition("=")
                    pods = [pod.body() for pod in cluster.pods.values() if pod.labels.get(key) == value]
                    return self._send(200, {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": pods})
                if verb == "create":
                    body = json.loads(raw)
                    if body["metadata"]["name"] in cluster.job_sets:
                        return self._fail(409, f'jobsets "{body["metadata"]["name"]}" already exists')
                    try:
                        return self._send(201, cluster.create(body))
                    except ValueError as error:
                        return self._fail(400, str(error))
                if name not in cluster.job_sets:
                    return self._fail(404, f'jobsets "{name}" not found')
                if verb == "delete":
                    assert query["propagationPolicy"] == ["Foreground"]
                    cluster.delete(name)
                return self._send(200, cluster.job_sets[name])

        def _log(self, name: str, query: dict[str, list[str]]) -> None:
            pod = cluster.pods.get(name)
            if pod is None:
                return self._fail(404, f'pods "{name}" not found')
            if pod.phase == "Pending":
                return self._fail(400, f'container "train" in pod "{name}" is waiting to start: ContainerCreating')
            since = timedelta(seconds=int(query.get("sinceSeconds", ["1000000"])[0]))
            oldest = f"{datetime.now(UTC) - since:%Y-%m-%dT%H:%M:%S}"
            tail = int(query.get("tailLines", ["1000000"])[0])
            with cluster.changed:
                first = max(len(pod.lines) - tail, sum(line < oldest for line in pod.lines))
            if "follow" not in query:
                text = "\n".join(line.partition(" ")[2] for line in pod.lines[first:])
                return self._send(200, text, "text/plain")
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for line in self._lines(pod, first):
                self._chunk(f"{line}\n".encode())
            if not pod.terminated:  # cut off
                self.close_connection = True
                return None
            return self._chunk(b"")

        def _lines(self, pod: Pod, first: int) -> Iterator[str]:
            until, index = time.monotonic() + cluster.cut, first
            while time.monotonic() < until:
                with cluster.changed:
                    if len(pod.lines) == index and not pod.terminated:
                        cluster.changed.wait(0.1)
                    lines = pod.lines[index:]
                    if not lines and pod.terminated:
                        return
                index += len(lines)
                yield from lines

        def _chunk(self, data: bytes) -> None:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()

        def _fail(self, status: int, message: str) -> None:
            self._send(status, {"kind": "Status", "status": "Failure", "message": message, "code": status})

        def _send(self, status: int, body: Any, kind: str = "application/json") -> None:
            data = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler


@contextmanager
def running(allowed: Allowed, folder: Path) -> Iterator[tuple[FakeCluster, Path]]:
    """A cluster, and the kubeconfig that leads to it."""
    cluster = FakeCluster(allowed, folder)
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "clusters": [
            {"name": "test", "cluster": {"server": f"http://127.0.0.1:{cluster.server.server_port}"}},
        ],
        "users": [{"name": "test", "user": {"token": TOKEN}}],
    }
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(kubeconfig))
    try:
        yield cluster, path
    finally:
        cluster.close()
