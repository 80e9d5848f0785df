"""`python -m pipelines`: compile, run or submit a pipeline; `demo` does all of it on this machine."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import io
import logging
import os
import sys
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genie_model.config import Config
from genie_model.presets import get_preset, preset_names
from pipelines.local import (
    PIPELINES,
    STUDIES,
    PipelineError,
    interrupt_on_signals,
    locked,
    pipeline_named,
    run_locally,
    say,
)

if TYPE_CHECKING:
    from genie_model.tracking import Reported


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 2 for a wrong argument, 1 for a failure, 130 for Ctrl-C; each after one line."""
    args = _parser().parse_args(arguments)
    if args.command == "report":
        return _report(args)
    try:
        config = get_preset(args.preset).with_overrides(*args.set)
    except ValueError as error:
        return _refuse(str(error), 2)
    try:
        interrupt_on_signals()
        return {"compile": _compile, "run": _run, "submit": _submit, "demo": _demo}[args.command](args, config)
    except (ValueError, OSError, PipelineError) as error:
        return _refuse(str(error), 1)
    except KeyboardInterrupt:
        return _refuse("stopped; the same command carries on", 130)


def _port(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: 1 to 65535")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdigit() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a seed: 0 to {2**31 - 1}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipelines", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "compile": "write the YAML to upload in the Kubeflow UI",
        "run": "run it on this machine, as the demo does, without serving",
        "submit": "start it on a Kubeflow Pipelines host",
        "demo": "run it on this machine, then serve the world it made",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == "demo":
            command.set_defaults(pipeline="coinrun")
        else:
            command.add_argument("pipeline", choices=PIPELINES)
            command.add_argument("--seeds", type=_seed, nargs="+", help="of a study: a run of every variant for each")
            command.add_argument("--variant", action="append", help="of a study: only this one (may be repeated)")
            command.add_argument("--model", help="of cloning: a trained world's folder (default: trains one first)")
        preset = "demo" if name == "demo" else "coinrun"
        command.add_argument("--preset", default=preset, help=f"one of {', '.join(preset_names())} (default: {preset})")
        command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a config field")
        command.add_argument("--root", help="where data sets and models lie, e.g. gs://bucket/genie")
        command.add_argument("--experiment", default="genie", help="MLflow experiment (default: genie)")
        if name in ("compile", "submit", "run"):
            command.add_argument("--tracking-uri", default="", help="MLflow server (default: MLFLOW_TRACKING_URI)")
        if name in ("run", "demo"):
            command.add_argument("--state", default=".genie", help="folder for everything local (default: .genie)")
            command.add_argument(
                "--no-cache",
                action="store_true",
                help="open finished steps again; what they made whole is still reused",
            )
            command.add_argument("--mlflow-port", type=_port, default=5000, help="default: 5000, or the next free one")
        if name == "demo":
            command.add_argument(
                "--port", type=_port, default=8000, help="the page's; default: 8000, or the next free one"
            )
        if name == "compile":
            command.add_argument("--output", help="default: build/PIPELINE.yaml")
        if name == "submit":
            command.add_argument("--host", required=True, help="URL of the Kubeflow Pipelines API")
    command = commands.add_parser("report", help="make a study's report from MLflow", description="from MLflow alone")
    command.add_argument("pipeline", choices=STUDIES)
    command.add_argument("--tracking-uri", default="", help="MLflow server (default: MLFLOW_TRACKING_URI)")
    command.add_argument("--experiment", default="genie", help="MLflow experiment (default: genie)")
    command.add_argument("--state", default=".genie", help="folder whose MLflow store is read if no server is named")
    command.add_argument("--run", help="the study's MLflow run (default: the one last asked for)")
    command.add_argument("--output", default="build", help="folder for NAME.html and NAME.md (default: build)")
    return parser


def _arguments(args: argparse.Namespace, root_uri: str | None) -> dict[str, Any]:
    """What the pipeline is given, its MLflow server aside. Raises ValueError for what only a study takes."""
    values: dict[str, Any] = {"preset": args.preset, "overrides": args.set, "experiment": args.experiment}
    values |= {"root_uri": root_uri} if root_uri else {}
    asked = {"seeds": getattr(args, "seeds", None), "variants": getattr(args, "variant", None)}
    asked = {name: value for name, value in asked.items() if value is not None}
    if asked and args.pipeline not in STUDIES:
        raise ValueError(f"--seeds and --variant are for studies: {', '.join(STUDIES)}")
    if model_uri := getattr(args, "model", None):
        if args.pipeline != "cloning":
            raise ValueError("--model is for cloning: the others train their own world")
        asked["model_uri"] = model_uri
    return values | asked


def _compile(args: argparse.Namespace, config: Config) -> int:
    output = Path(args.output or f"build/{args.pipeline}.yaml")
    _write_package(args, output)
    say(f"{output}: upload it in the Kubeflow UI; preset {args.preset} and its overrides are the form's defaults")
    return 0


def _run(args: argparse.Namespace, config: Config) -> int:
    if args.pipeline in STUDIES:
        from genie_model.studies import cells

        cells(args.pipeline, args.preset, args.set, args.seeds or [0], args.variant or [])  # is there such a study?
    state = Path(args.state).absolute()
    with locked(state), _tracking(args, state) as tracking_uri:
        _run_pipeline(args, config, state, tracking_uri)
    return 0


def _submit(args: argparse.Namespace, config: Config) -> int:
    if not args.root:
        raise ValueError(
            "submit needs --root, a URI that the cluster's steps can read and write, e.g. gs://bucket/genie"
        )
    _reach(args.host)
    package = Path(f"build/{args.pipeline}.yaml")
    _write_package(args, package)
    say(f"submits {package} to {args.host}")
    run_id = _start(args.host, package, args.experiment)
    say(f"run {run_id}: {args.host.rstrip('/')}/#/runs/details/{run_id}")
    return 0


def _demo(args: argparse.Namespace, config: Config) -> int:
    from pipelines.servers import free_port, mlflow_server, play_server

    state = Path(args.state).absolute()
    page_port = free_port(args.port, "the play page")  # before the training: what cannot be had shows at once
    with locked(state), mlflow_server(state, args.mlflow_port) as tracking_uri:
        _run_pipeline(args, config, state, tracking_uri)
        return play_server(state, tracking_uri, page_port)


def _report(args: argparse.Namespace) -> int:
    from genie_model.tracking import TrackingError, connect, newest_study, report

    try:
        own = Path(args.state, "mlflow", "mlflow.db").absolute()
        named = args.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{own}"
        if named == f"sqlite:///{own}" and not own.exists():
            raise ValueError(f"there is no MLflow store at {own}: name a server with --tracking-uri")
        client = connect(named)
        run_id = args.run or newest_study(args.pipeline, client, args.experiment)
        found = report(args.pipeline, client, run_id)
    except (ValueError, TrackingError) as error:
        return _refuse(str(error), 1)
    say(f"MLflow run {run_id}")
    _write_report(found, args.pipeline, Path(args.output))
    return 0


def _write_report(found: Reported, name: str, folder: Path) -> None:
    from PIL import Image

    comparison = found.comparison
    folder.mkdir(parents=True, exist_ok=True)
    for picture, image_HWC in comparison.pictures.items():
        Image.fromarray(image_HWC).save(folder / f"{name}_{picture}.png")
    files = {f"{name}.html": comparison.html(), f"{name}_model_card.md": found.card}
    files[f"{name}.md"] = comparison.markdown(f"{name}_{{}}.png")
    for file, text in files.items():
        (folder / file).write_text(text)
    print(files[f"{name}.md"])
    say(f"written to {folder}: {', '.join(files)} and its pictures")


def _run_pipeline(args: argparse.Namespace, config: Config, state: Path, tracking_uri: str) -> None:
    root_uri = args.root or str(state)
    say(f"preset {args.preset}{''.join(f' {override}' for override in args.set)}; everything is kept in {root_uri}")
    named = getattr(args, "tracking_uri", None) or os.environ.get("MLFLOW_TRACKING_URI")
    if args.command == "demo" or not named:  # the server is our own: its port may change, its database does not
        named = str((state / "mlflow" / "mlflow.db").stat().st_ino)
    arguments = _arguments(args, root_uri)
    run_locally(args.pipeline, arguments, config, tracking_uri, state, not args.no_cache, named)


@contextlib.contextmanager
def _tracking(args: argparse.Namespace, state: Path):  # type: ignore[no-untyped-def]
    """The MLflow server that was named, else one of this run's own."""
    from pipelines.servers import mlflow_server

    if named := args.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"):
        yield named
    else:
        with mlflow_server(state, args.mlflow_port) as tracking_uri:
            yield tracking_uri


def _reach(host: str) -> None:
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


def _start(host: str, package: Path, experiment: str) -> str:
    """The id of the run that KFP's client started; what the client prints and logs meanwhile is dropped."""
    import kfp

    logging.disable()  # it logs a stack trace for every try
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            client = kfp.Client(host=host)
            run_id = client.create_run_from_pipeline_package(str(package), experiment_name=experiment).run_id
    except TimeoutError:
        raise ValueError(
            f"{host} lets nobody in without signing in: set KF_PIPELINES_IAP_OAUTH2_CLIENT_ID or what else kfp.Client "
            "reads, or port-forward the API"
        ) from None
    except Exception as error:  # an odd answer breaks the client anywhere
        said = getattr(error, "body", None) or error
        raise ValueError(f"{host} did not take the pipeline: {' '.join(str(said).split())[:300]}") from None
    finally:
        logging.disable(logging.NOTSET)
    if not run_id:
        raise _not_kubeflow(host, "no run's id")
    return str(run_id)


def _not_kubeflow(host: str, answered: str) -> ValueError:
    return ValueError(
        f"{host} answers, but not as a Kubeflow Pipelines API does ({answered}): check --host, e.g. "
        "http://localhost:8080 after `kubectl port-forward -n kubeflow svc/ml-pipeline-ui 8080:80`"
    )


def _write_package(args: argparse.Namespace, output: Path) -> None:
    from kfp import compiler

    values = _arguments(args, args.root) | {"tracking_uri": args.tracking_uri}
    output.parent.mkdir(parents=True, exist_ok=True)
    half = output.with_name(f".{output.name}.tmp.yaml")
    compiler.Compiler().compile(pipeline_named(args.pipeline), str(half), pipeline_parameters=values)
    half.replace(output)


def _refuse(reason: str, status: int) -> int:
    print(f"pipelines: {reason}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
