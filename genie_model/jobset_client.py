"""What training on several hosts asks the API server of a cluster for, about one JobSet and its pods.

This is the only import of the Kubernetes client. Its role needs: create, get and delete jobsets, list pods, get
pods/log.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from kubernetes import client
from kubernetes import config as kubernetes_config
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from genie_model.jobset import CONTAINER, GROUP, INDEX_LABEL, NAME_LABEL, PLURAL, VERSION
from genie_model.progress import summary

TAIL = 20  # lines
_AWAY = (429, 500, 502, 503, 504)  # what an API server answers that may be well soon
_PATIENCE = 300.0  # seconds for which it may be away


class JobSetClient:
    """The few requests that Role genie-launcher allows, about one JobSet.

    What is away for a while is waited for; anything else raises as `launcher.launch` says.
    """

    def __init__(self, namespace: str, name: str) -> None:
        self.namespace, self.name = namespace, name
        api = client.ApiClient(_configuration())
        self._custom, self._core = client.CustomObjectsApi(api), client.CoreV1Api(api)
        self._where = {"group": GROUP, "version": VERSION, "namespace": namespace, "plural": PLURAL}

    def say(self, text: str) -> None:
        summary(self.name, text)

    def create(self, body: dict[str, Any]) -> bool:
        """Whether it was: not where one of its name is there."""
        call = self._custom.create_namespaced_custom_object
        return self._ask(call, 409, **self._where, body=body, field_validation="Strict") is not None

    def job_set(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self._ask(
            self._custom.get_namespaced_custom_object, 404, **self._where, name=self.name
        )
        return found

    def delete(self) -> None:
        """Its Jobs and pods go first: it is there until they are gone."""
        call = self._custom.delete_namespaced_custom_object
        self._ask(call, 404, **self._where, name=self.name, propagation_policy="Foreground")

    def pods(self) -> list[Any]:
        """By host."""
        call, selector = self._core.list_namespaced_pod, f"{NAME_LABEL}={self.name}"
        return sorted(self._ask(call, namespace=self.namespace, label_selector=selector).items, key=host)

    def tail(self, pod: str) -> list[str]:
        """The last lines of its log; none where it is gone."""
        call = self._core.read_namespaced_pod_log
        where = {"name": pod, "namespace": self.namespace, "container": CONTAINER}
        return (self._ask(call, 400, 404, **where, tail_lines=TAIL) or "").splitlines()

    def log(self, pod: str, idle_seconds: float, **part: int) -> Iterator[str]:
        """Lines as they come, each behind its time; ends with the log, or when the stream breaks or is idle."""
        where = {"name": pod, "namespace": self.namespace, "container": CONTAINER, **part}
        lasting = {"follow": True, "_preload_content": False, "_request_timeout": (10, idle_seconds)}
        try:
            with contextlib.closing(self._core.read_namespaced_pod_log(**where, **lasting, timestamps=True)) as stream:
                for line in stream:
                    yield line.decode(errors="replace").rstrip("\n")
        except ApiException as error:
            if error.status not in (400, 404, *_AWAY):  # it has not begun, or is gone
                raise self._explained(error) from None
        except HTTPError:
            return  # whoever reads comes back

    def _ask(self, call: Callable[..., Any], *fine: int, **arguments: Any) -> Any:
        """What the server answers; nothing for a status that is `fine`."""
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                return call(**arguments, _request_timeout=30)
            except ApiException as error:
                if error.status in fine:
                    return None
                if error.status not in _AWAY:
                    raise self._explained(error) from None
                problem = f"{error.status} {error.reason}"
            except HTTPError as error:
                problem = str(error)
            if time.monotonic() > until:
                raise ConnectionError(f"the cluster's API server has been away for {_PATIENCE:.0f} s: {problem}")
            time.sleep(1)

    def _explained(self, error: ApiException) -> Exception:
        try:
            said = json.loads(error.body)["message"]
        except (TypeError, ValueError, KeyError):
            said = error.reason
        if error.status in (401, 403):
            role = f"bind Role genie-launcher of namespace {self.namespace} to who runs this"
            return PermissionError(f"the cluster does not allow it: {said}; {role}")
        if error.status == 404:
            return ValueError(f"the cluster knows no JobSet: install JobSet 0.10 or newer ({said})")
        if error.status in (400, 422):
            return ValueError(f"the cluster refuses JobSet {self.name}: {said}; JobSet must be 0.10 or newer")
        return OSError(f"the cluster answers {error.status}: {said}")


def host(pod: Any) -> int:
    """Which of the slice's hosts the pod is, from 0."""
    return int((pod.metadata.labels or {}).get(INDEX_LABEL, 0))


def _configuration() -> client.Configuration:
    """That of $KUBECONFIG, else of the pod that this runs in, else of ~/.kube/config. Raises ValueError for none."""
    configuration = client.Configuration()
    try:
        if not os.environ.get("KUBECONFIG") and "KUBERNETES_SERVICE_HOST" in os.environ:
            kubernetes_config.load_incluster_config(client_configuration=configuration)
        else:
            kubernetes_config.load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=configuration)
    except kubernetes_config.ConfigException as error:
        raise ValueError(f"no cluster to ask: set KUBECONFIG, or run this in a pod ({error})") from None
    return configuration
