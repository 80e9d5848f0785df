"""That what objects say of each other is so. A rule takes an overlay's objects and says what points nowhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from manifests.objects import CLUSTER_SCOPED, Object, Objects, matches, name_of

# Secrets that nothing in git makes, and their keys: README.md says how they are made.
BY_HAND = {"mlflow-database": ["username", "password"], "genie-sessions": ["password"], "genie-api-keys": ["keys.toml"]}


def selectors(objects: Objects) -> Iterator[str]:
    """Each selects something: a workload its own pods, a policy or a service a pod, a monitor a service or a pod."""
    for workload in objects.of("Deployment", "StatefulSet"):
        template = workload["spec"]["template"]
        labels = template.get("metadata", {}).get("labels", {})
        if not matches(workload["spec"]["selector"], labels):
            yield f"{name_of(workload)}: its selector does not match its pods"
        for spread in template["spec"].get("topologySpreadConstraints", []):
            if not matches(spread.get("labelSelector", {}), labels):
                yield f"{name_of(workload)}: a topologySpreadConstraint does not match its pods"
    for where, selector in _pod_selectors(objects):
        if not objects.selected(selector):
            yield f"{where}: {json.dumps(selector)} selects no pod"
    for monitor in objects.of("ServiceMonitor"):
        if not list(_monitored(objects, monitor)):
            yield f"{name_of(monitor)}: its selector selects no Service"


def ports(objects: Objects) -> Iterator[str]:
    """Each that is named is there, on what it leads to."""
    for service in objects.of("Service"):
        for port in service["spec"].get("ports", []):
            target = port.get("targetPort", port["port"])
            for pod in objects.selected({"matchLabels": service["spec"].get("selector", {})}):
                if not pod.has_port(target):
                    yield f"{name_of(service)}: port {port['port']} leads to {target}, which {pod.owner} has not"
    for policy in objects.of("NetworkPolicy"):
        spec = policy["spec"]
        ways = [(spec["podSelector"], rule) for rule in spec.get("ingress", [])]
        for rule in spec.get("egress", []):
            ways += [(peer["podSelector"], rule) for peer in rule.get("to", []) if _is_ours(peer)]
        for selector, rule in ways:
            for port in (one for one in rule.get("ports", []) if "port" in one):
                for pod in objects.selected(selector):
                    if not pod.has_port(port["port"]):
                        yield f"{name_of(policy)}: opens port {port['port']}, which {pod.owner} has not"
    for monitor in objects.of("ServiceMonitor"):
        for endpoint in monitor["spec"]["endpoints"]:
            for service in _monitored(objects, monitor):
                if endpoint["port"] not in [port.get("name") for port in service["spec"].get("ports", [])]:
                    yield f"{name_of(monitor)}: {name_of(service)} has no port {endpoint['port']}"
    for monitor in _own_pod_monitors(objects):
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            for pod in objects.selected(monitor["spec"]["selector"]):
                if not pod.has_port(endpoint["port"]):
                    yield f"{name_of(monitor)}: {pod.owner} has no port {endpoint['port']}"
    for ingress in objects.of("Ingress"):
        for backend in _backends(ingress):
            found = objects.get("Service", backend["name"])
            if found is None:
                yield f"{name_of(ingress)}: there is no Service {backend['name']}"
            elif not set(backend["port"].values()) & _port_names(found):
                yield f"{name_of(ingress)}: Service {backend['name']} has no port {backend['port']}"
    for config in objects.of("BackendConfig"):
        port = config["spec"].get("healthCheck", {}).get("port")
        if port and not any(pod.has_port(port) for pod in objects.pods):
            yield f"{name_of(config)}: its health check asks port {port}, which no pod has"


def references(objects: Objects) -> Iterator[str]:
    """What objects name is there, Secrets made elsewhere included, with the keys that are read."""
    external = {
        one["spec"]["target"]["name"]: [data["secretKey"] for data in one["spec"]["data"]]
        for one in objects.of("ExternalSecret")
    }
    for where, kind, name, key in _named(objects):
        made_elsewhere = (external if external else BY_HAND) if kind == "Secret" else {}
        if found := objects.get(kind, name):
            keys = list(found.get("data", {}))
        elif name in made_elsewhere:
            keys = made_elsewhere[name]
        else:
            yield f"{where}: there is no {kind} {name}"
            continue
        if key and key not in keys:
            yield f"{where}: {kind} {name} has no key {key}"


def namespaces(objects: Objects) -> Iterator[str]:
    """All in the one that comes along, which takes no pod but a restricted one."""
    made = list(objects.of("Namespace"))
    if len(made) != 1:
        yield f"there are {len(made)} Namespaces; there has to be one"
        return
    (namespace,) = made
    for mode in ("enforce", "audit", "warn"):
        if namespace["metadata"].get("labels", {}).get(f"pod-security.kubernetes.io/{mode}") != "restricted":
            yield f"{name_of(namespace)}: needs the label pod-security.kubernetes.io/{mode}: restricted"
    for one in objects.all:
        if one["kind"] not in CLUSTER_SCOPED and one["metadata"].get("namespace") != namespace["metadata"]["name"]:
            yield f"{name_of(one)}: is in namespace {one['metadata'].get('namespace')}"
        if one["metadata"].get("labels", {}).get("app.kubernetes.io/part-of") != "genie":
            yield f"{name_of(one)}: needs the label app.kubernetes.io/part-of: genie"


def denied(objects: Objects) -> Iterator[str]:
    """A policy that shuts everybody off, both ways: the others are openings in it."""
    for policy in objects.of("NetworkPolicy"):
        spec = policy["spec"]
        if spec["podSelector"] == {} and not {"ingress", "egress"} & spec.keys():
            if {*spec["policyTypes"]} == {"Ingress", "Egress"}:
                return
            yield f"{name_of(policy)}: denies only {', '.join(spec['policyTypes'])}"
    yield "there is no NetworkPolicy that denies everybody everything"


def cluster(objects: Objects, settings: Mapping[str, str], described: Mapping[str, Any]) -> Iterator[str]:
    """That a description of the cluster, by which pipelines run, is of the same place as an overlay's objects."""
    if missing := {"namespace", "tracking_uri", "root_uri", "service_account"} - described.keys():
        yield f"has no {', '.join(sorted(missing))}"
        return
    namespace = next((one["metadata"]["name"] for one in objects.of("Namespace")), "")
    tracking, root = urlsplit(described["tracking_uri"]), urlsplit(described["root_uri"])
    service = objects.get("Service", "mlflow")
    served = _port_names(service) if service else set()
    if described["namespace"] != namespace:
        yield f"namespace is {described['namespace']}, and the overlay's {namespace}"
    if tracking.hostname != f"mlflow.{namespace}.svc.cluster.local" or tracking.port not in served:
        yield f"tracking_uri is not http://mlflow.{namespace}.svc.cluster.local and a port of its Service"
    if root.netloc != settings.get("BUCKET"):
        yield f"root_uri is in the bucket {root.netloc}, and settings.env says {settings.get('BUCKET', 'none')}"
    if not objects.get("ServiceAccount", described["service_account"]):
        yield f"there is no ServiceAccount {described['service_account']}"


RULES = (selectors, ports, references, namespaces, denied)


def _is_ours(peer: Object) -> bool:
    return "podSelector" in peer and "namespaceSelector" not in peer


def _pod_selectors(objects: Objects) -> Iterator[tuple[str, Object]]:
    for service in objects.of("Service"):
        if selector := service["spec"].get("selector"):
            yield name_of(service), {"matchLabels": selector}
    for one in (*objects.of("PodDisruptionBudget"), *_own_pod_monitors(objects)):
        yield name_of(one), one["spec"]["selector"]
    for policy in objects.of("NetworkPolicy"):
        spec = policy["spec"]
        yield name_of(policy), spec["podSelector"]
        peers = [peer for rule in spec.get("ingress", []) for peer in rule.get("from", [])]
        peers += [peer for rule in spec.get("egress", []) for peer in rule.get("to", [])]
        for peer in filter(_is_ours, peers):
            yield name_of(policy), peer["podSelector"]


def _monitored(objects: Objects, monitor: Object) -> Iterator[Object]:
    selector = monitor["spec"]["selector"]
    return (one for one in objects.of("Service") if matches(selector, one["metadata"].get("labels", {})))


def _own_pod_monitors(objects: Objects) -> Iterator[Object]:
    """Those of this namespace: what runs in others is not ours to know."""
    return (one for one in objects.of("PodMonitor") if "namespaceSelector" not in one["spec"])


def _backends(ingress: Object) -> Iterator[Object]:
    if default := ingress["spec"].get("defaultBackend"):
        yield default["service"]
    for rule in ingress["spec"].get("rules", []):
        for path in rule.get("http", {}).get("paths", []):
            yield path["backend"]["service"]


def _port_names(service: Object) -> set[str | int]:
    return {name for port in service["spec"].get("ports", []) for name in (port["port"], port.get("name")) if name}


def _named(objects: Objects) -> Iterator[tuple[str, str, str, str]]:
    """What names another object: where, its kind and name, and the key that is read of it, if one is."""
    for pod in objects.pods:
        yield pod.owner, "ServiceAccount", pod.spec.get("serviceAccountName", "default"), ""
        for volume in pod.spec.get("volumes", []):
            if "secret" in volume:
                yield pod.owner, "Secret", volume["secret"]["secretName"], ""
            if "configMap" in volume:
                yield pod.owner, "ConfigMap", volume["configMap"]["name"], ""
            if "persistentVolumeClaim" in volume:
                yield pod.owner, "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"], ""
    kinds = {"configMapRef": "ConfigMap", "secretRef": "Secret"}
    key_kinds = {"configMapKeyRef": "ConfigMap", "secretKeyRef": "Secret"}
    for where, _, container in objects.containers():
        for source in container.get("envFrom", []):
            for field in kinds.keys() & source.keys():
                yield where, kinds[field], source[field]["name"], ""
        for variable in container.get("env", []):
            source = variable.get("valueFrom", {})
            for field in key_kinds.keys() & source.keys():
                yield where, key_kinds[field], source[field]["name"], source[field]["key"]
    for one in objects.of("StatefulSet"):
        yield name_of(one), "Service", one["spec"]["serviceName"], ""
    for one in objects.of("HorizontalPodAutoscaler"):
        yield name_of(one), one["spec"]["scaleTargetRef"]["kind"], one["spec"]["scaleTargetRef"]["name"], ""
    for one in objects.of("RoleBinding"):
        yield name_of(one), one["roleRef"]["kind"], one["roleRef"]["name"], ""
        for subject in one["subjects"]:
            if subject.get("namespace") == one["metadata"].get("namespace"):
                yield name_of(one), subject["kind"], subject["name"], ""
    for one in objects.of("ExternalSecret"):
        yield name_of(one), one["spec"]["secretStoreRef"]["kind"], one["spec"]["secretStoreRef"]["name"], ""
    for one in objects.of("SecretStore"):
        account = one["spec"]["provider"]["gcpsm"]["auth"]["workloadIdentity"]["serviceAccountRef"]["name"]
        yield name_of(one), "ServiceAccount", account, ""
    for one in objects.of("Service", "Ingress"):
        annotations = one["metadata"].get("annotations", {})
        for name in json.loads(annotations.get("cloud.google.com/backend-config", "{}")).values():
            yield name_of(one), "BackendConfig", name, ""
        if name := annotations.get("networking.gke.io/v1beta1.FrontendConfig"):
            yield name_of(one), "FrontendConfig", name, ""
        for name in filter(None, annotations.get("networking.gke.io/managed-certificates", "").split(",")):
            yield name_of(one), "ManagedCertificate", name, ""
