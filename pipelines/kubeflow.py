"""What is asked of a Kubeflow Pipelines host: to start a pipeline now, or by the clock."""

from __future__ import annotations

import contextlib
import http.client
import io
import logging
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_MOST_PAGES = 100  # of 100 recurring runs each; whatever pages on for ever is no Kubeflow


def reach(host: str) -> None:
    """Raises ValueError at once when no Kubeflow Pipelines API can be there; KFP's client tries for half a minute.

    A host that wants a sign-in passes: KFP's client may hold what it needs.
    """
    if not host.startswith(("http://", "https://")):
        raise ValueError(f"--host {host} is no URL: it begins with http:// or https://")
    try:
        urllib.request.urlopen(f"{host.rstrip('/')}/apis/v2beta1/healthz", timeout=10).close()
    except urllib.error.HTTPError as error:
        if error.code >= 400 and error.code not in (401, 403):
            raise _not_kubeflow(host, f"HTTP {error.code}") from None
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"no Kubeflow host answers at {host} ({error}); check --host, or port-forward it") from None


def start(host: str, package: Path, experiment: str) -> str:
    """Starts the compiled pipeline; returns the run's id. Raises ValueError, one line, when the host does not."""
    with _client(host, "take the pipeline") as client:
        run_id = client.create_run_from_pipeline_package(str(package), experiment_name=experiment).run_id
    if not run_id:
        raise _not_kubeflow(host, "no run's id")
    return str(run_id)


def schedule(host: str, package: Path, experiment: str, name: str, cron: str) -> tuple[str, int]:
    """Starts the compiled pipeline whenever `cron` says, in UTC; returns the recurring run's id, and what it replaced.

    Those of the same name in the experiment are deleted once the new one is there, so none is missed, and the same
    again changes nothing. A run that is still going when the next is due goes on alone; what was missed meanwhile is
    not made up for. Raises ValueError, one line, for what is no cron expression, or when the host does not.
    """
    expression = kubeflow_cron(cron)
    with _client(host, "take the schedule") as client:
        experiment_id = client.create_experiment(experiment).experiment_id
        before = _named(client, name, experiment_id)
        made = client.create_recurring_run(
            experiment_id,
            name,
            description=f"{cron} UTC, by `python -m pipelines schedule`",
            cron_expression=expression,
            max_concurrency=1,
            no_catchup=True,
            pipeline_package_path=str(package),
        ).recurring_run_id
        for old in before if made else ():
            client.delete_recurring_run(old)
    if not made:
        raise _not_kubeflow(host, "no recurring run's id")
    return str(made), len(before)


def unschedule(host: str, experiment: str, name: str) -> int:
    """Deletes the recurring runs of that name in the experiment; returns how many. Raises ValueError for none."""
    with _client(host, "drop the schedule") as client:
        experiment_id = client.get_experiment(experiment_name=experiment).experiment_id
        found = _named(client, name, experiment_id)
        for each in found:
            client.delete_recurring_run(each)
    if not found:
        raise ValueError(f"{host} has no recurring run {name!r} in experiment {experiment!r}: nothing was dropped")
    return len(found)


def kubeflow_cron(cron: str) -> str:
    """Five fields (minute hour day month weekday) as the six that Kubeflow reads: its first are seconds.

    It takes five for six without a weekday: "0 3 * * *" would be the third minute of every hour. Raises ValueError for
    anything but five fields that make sense.
    """
    next_time(cron)
    return f"0 {cron}"


def next_time(cron: str) -> datetime:
    """When it is due next, in UTC. Raises ValueError as `kubeflow_cron`."""
    from croniter import CroniterError, croniter

    wanted = "minute hour day month weekday, e.g. '0 3 * * *' for every night at 03:00 UTC"
    if len(cron.split()) != 5:
        raise ValueError(f"--cron {cron!r} has {len(cron.split())} fields, not five: {wanted}")
    try:
        due: datetime = croniter(cron, datetime.now(UTC)).get_next(datetime)
    except CroniterError as error:
        raise ValueError(f"--cron {cron!r} is no cron expression ({error}): {wanted}") from None
    return due


def _named(client: Any, name: str, experiment_id: str) -> list[str]:
    """The ids of the experiment's recurring runs of that name."""
    found, token = [], ""
    for _ in range(_MOST_PAGES):
        page = client.list_recurring_runs(page_token=token, page_size=100, experiment_id=experiment_id)
        found += [each.recurring_run_id for each in page.recurring_runs or [] if each.display_name == name]
        token = page.next_page_token
        if not token:
            break
    return found


@contextlib.contextmanager
def _client(host: str, wanted: str) -> Iterator[Any]:
    """KFP's client; what it prints and logs is dropped, and its errors are ValueErrors of one line."""
    import kfp

    logging.disable()  # it logs a stack trace for every try
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield kfp.Client(host=host)
    except TimeoutError:
        raise ValueError(
            f"{host} lets nobody in without signing in: set KF_PIPELINES_IAP_OAUTH2_CLIENT_ID or what else kfp.Client "
            "reads, or port-forward the API"
        ) from None
    except Exception as error:  # an odd answer breaks the client anywhere
        said = getattr(error, "body", None) or error
        raise ValueError(f"{host} did not {wanted}: {' '.join(str(said).split())[:300]}") from None
    finally:
        logging.disable(logging.NOTSET)


def _not_kubeflow(host: str, answered: str) -> ValueError:
    return ValueError(
        f"{host} answers, but not as a Kubeflow Pipelines API does ({answered}): check --host, e.g. "
        "http://localhost:8080 after `kubectl port-forward -n kubeflow svc/ml-pipeline-ui 8080:80`"
    )
