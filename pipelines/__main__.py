"""`python -m pipelines`: compile, run, submit or schedule a pipeline; `demo` does all of it on this machine."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from genie_model.config import Config
from genie_model.presets import get_preset
from pipelines.arguments import parser, values
from pipelines.catalog import own_preset, pipeline_named
from pipelines.local import PipelineError, interrupt_on_signals, locked, run_locally, say


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 2 for a wrong argument, 1 for a failure, 130 for Ctrl-C; each after one line."""
    args = parser(__doc__).parse_args(arguments)
    try:
        if "preset" in args and args.preset is None:
            args.preset = own_preset(args.pipeline)
        config = get_preset(getattr(args, "preset", "tiny")).with_overrides(*getattr(args, "set", []))
    except ValueError as error:
        return _refuse(str(error), 2)
    commands = {
        "compile": _compile,
        "run": _run,
        "submit": _submit,
        "schedule": _schedule,
        "unschedule": _unschedule,
        "demo": _demo,
        "rollback": _rollback,
        "report": _report,
    }
    try:
        interrupt_on_signals()
        return commands[args.command](args, config)
    except (ValueError, OSError, PipelineError) as error:
        return _refuse(str(error), 1)
    except KeyboardInterrupt:
        return _refuse("stopped; the same command carries on", 130)


def _compile(args: argparse.Namespace, config: Config) -> int:
    output = Path(args.output or f"build/{args.pipeline}.yaml")
    _write_package(args, output)
    say(f"{output}: upload it in the Kubeflow UI; preset {args.preset} and its overrides are the form's defaults")
    return 0


def _run(args: argparse.Namespace, config: Config) -> int:
    state = Path(args.state).absolute()
    given = values(args, args.root or str(state))
    with locked(state), _tracking(args, state) as tracking_uri:
        _run_pipeline(args, given, config, state, tracking_uri)
    return 0


def _submit(args: argparse.Namespace, config: Config) -> int:
    from pipelines.kubeflow import reach, start

    package = _package_for_host(args)
    reach(args.host)
    say(f"submits {package} to {args.host}")
    run_id = start(args.host, package, args.experiment)
    say(f"run {run_id}: {args.host.rstrip('/')}/#/runs/details/{run_id}")
    return 0


def _schedule(args: argparse.Namespace, config: Config) -> int:
    from pipelines.kubeflow import next_time, reach, schedule

    due = next_time(args.cron)  # a wrong expression shows first
    package = _package_for_host(args)
    reach(args.host)
    run_id, replaced = schedule(args.host, package, args.experiment, _name(args), args.cron)
    say(
        f"{_name(args)} runs next at {due:%Y-%m-%d %H:%M} UTC{', in place of what was scheduled' if replaced else ''}: "
        f"{args.host.rstrip('/')}/#/recurringrun/details/{run_id}"
    )
    return 0


def _unschedule(args: argparse.Namespace, config: Config) -> int:
    from pipelines.kubeflow import reach, unschedule

    reach(args.host)
    unschedule(args.host, args.experiment, _name(args))
    say(f"{_name(args)} is scheduled no longer")
    return 0


def _demo(args: argparse.Namespace, config: Config) -> int:
    from pipelines.servers import free_port, mlflow_server, play_server

    state = Path(args.state).absolute()
    page_port = free_port(args.port, "the play page")  # before the training: what cannot be had shows at once
    with locked(state), mlflow_server(state, args.mlflow_port) as tracking_uri:
        _run_pipeline(args, values(args, args.root or str(state)), config, state, tracking_uri)
        return play_server(state, tracking_uri, page_port)


def _rollback(args: argparse.Namespace, config: Config) -> int:
    from genie_model.tracking import TrackingError, rollback

    try:
        rollback(_store(args), args.model_name or "genie", dry_run=args.dry_run)
    except TrackingError as error:
        raise ValueError(f"MLflow: {error}") from None
    return 0


def _report(args: argparse.Namespace, config: Config) -> int:
    from genie_model.tracking import TrackingError, newest_study, report
    from pipelines.reports import write_report

    try:
        client = _store(args)
        run_id = args.run or newest_study(args.pipeline, client, args.experiment)
        found = report(args.pipeline, client, run_id)
    except TrackingError as error:
        raise ValueError(f"MLflow: {error}") from None
    say(f"MLflow run {run_id}")
    write_report(found, args.pipeline, Path(args.output))
    return 0


def _store(args: argparse.Namespace) -> Any:
    """A client of the MLflow server that was named, else of --state's own. Raises ValueError where there is none."""
    from genie_model.tracking import connect

    own = Path(args.state, "mlflow", "mlflow.db").absolute()
    named = args.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{own}"
    if named == f"sqlite:///{own}" and not own.exists():
        raise ValueError(f"there is no MLflow store at {own}: name a server with --tracking-uri")
    return connect(named)


def _run_pipeline(
    args: argparse.Namespace, given: dict[str, object], config: Config, state: Path, tracking_uri: str
) -> None:
    where = args.root or state
    say(f"preset {args.preset}{''.join(f' {override}' for override in args.set)}; everything is kept in {where}")
    named = getattr(args, "tracking_uri", None) or os.environ.get("MLFLOW_TRACKING_URI")
    if args.command == "demo" or not named:  # the server is our own: its port may change, its database does not
        named = str((state / "mlflow" / "mlflow.db").stat().st_ino)
    run_locally(args.pipeline, given, config, tracking_uri, state, not args.no_cache, named)


@contextlib.contextmanager
def _tracking(args: argparse.Namespace, state: Path):  # type: ignore[no-untyped-def]
    """The MLflow server that was named, else one of this run's own."""
    from pipelines.servers import mlflow_server

    if named := args.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"):
        yield named
    else:
        with mlflow_server(state, args.mlflow_port) as tracking_uri:
            yield tracking_uri


def _package_for_host(args: argparse.Namespace) -> Path:
    package = Path(f"build/{args.pipeline}.yaml")
    _write_package(args, package, wants_root=True)
    return package


def _write_package(args: argparse.Namespace, output: Path, wants_root: bool = False) -> None:
    """Compiles the pipeline for the cluster. Raises ValueError for what cannot run there."""
    from kfp import compiler

    from pipelines.placement import Cluster

    cluster = Cluster.read(args.cluster) if args.cluster else Cluster()
    root_uri = args.root or cluster.root_uri
    if wants_root and not root_uri and args.pipeline != "rollback":
        raise ValueError(
            f"{args.command} needs --root, a URI that the cluster's steps can read and write, e.g. gs://bucket/genie"
        )
    given = values(args, root_uri) | {"tracking_uri": args.tracking_uri}
    for name in ("root", "source", "labels", "prompts", "data", "eval", "model"):
        if (uri := given.get(f"{name}_uri")) and "://" not in uri:
            raise ValueError(f"--{name} {uri} is a path of this machine: name a URI, e.g. gs://bucket/genie")
    pipeline = pipeline_named(args.pipeline, cluster)
    if unpinned := cluster.unpinned():
        say(f"no registry has {', '.join(unpinned)} yet: `make images PUSH=1` builds them and writes {cluster.images}")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        whole = Path(scratch, "whole.yaml")
        compiler.Compiler().compile(pipeline, str(whole), pipeline_parameters=given)
        whole.replace(output)


def _name(args: argparse.Namespace) -> str:
    return args.name or f"genie-{args.pipeline}"


def _refuse(reason: str, status: int) -> int:
    print(f"pipelines: {reason}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
