"""What `python -m pipelines` understands, and what a pipeline is given of it."""

from __future__ import annotations

import argparse
from typing import Any

from genie_model.presets import preset_names
from pipelines.catalog import PIPELINES, STUDIES, UPKEEP

_COMMANDS = {
    "compile": "write the YAML to upload in the Kubeflow UI",
    "run": "run it on this machine, as the demo does, without serving",
    "submit": "start it on a Kubeflow Pipelines host",
    "schedule": "have a Kubeflow Pipelines host start it by the clock, in place of what it had under that name",
    "demo": "run it on this machine, then serve the world it made",
}
_ON_A_HOST = ("submit", "schedule")
_TRACKING = "MLflow server (default: MLFLOW_TRACKING_URI"


def parser(description: str) -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(prog="python -m pipelines", description=description)
    commands = whole.add_subparsers(dest="command", required=True)
    for name, text in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == "demo":
            command.set_defaults(pipeline="coinrun")
        else:
            _add_pipeline(command)
        preset, own = ("demo", "demo") if name == "demo" else (None, "the pipeline's own, as coinrun")
        command.add_argument("--preset", default=preset, help=f"one of {', '.join(preset_names())} (default: {own})")
        command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a config field")
        command.add_argument("--root", help="where data sets and models lie, e.g. gs://bucket/genie")
        _add_experiment(command)
        if name != "demo":
            command.add_argument("--tracking-uri", default="", help=f"{_TRACKING})")
        if name in ("compile", *_ON_A_HOST):
            command.add_argument(
                "--cluster", help="TOML file of what steps are placed by, e.g. manifests/overlays/dev/cluster.toml"
            )
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
        if name in _ON_A_HOST:
            _add_host(command)
        if name == "schedule":
            command.add_argument("--cron", required=True, help="minute hour day month weekday, UTC: '0 3 * * *'")
            _add_name(command)
    _add_others(commands)
    return whole


def values(args: argparse.Namespace, root_uri: str) -> dict[str, Any]:
    """What the pipeline is given, its MLflow server aside. Raises ValueError for what only others take."""
    given: dict[str, Any] = {"preset": args.preset, "overrides": args.set, "experiment": args.experiment}
    given |= {"root_uri": root_uri} if root_uri else {}
    for name, of, rule in (
        ("seeds", STUDIES, "--seeds and --variant are for studies"),
        ("variants", STUDIES, "--seeds and --variant are for studies"),
        ("model_uri", ("cloning", "decoder"), "--model is for what goes on from a trained world"),
        ("source_uri", ("video",), "--source is for video"),
        ("data_uri", ("curation", "decoder", "promotion", "champion"), "--data is for what takes a data set"),
        ("eval_uri", ("curation",), "--eval is for curation"),
        ("prompts_uri", ("video",), "--prompts is for video"),
        ("labels_uri", ("video", "curation"), "--labels is for video and curation"),
        ("model_name", ("video", "decoder", *UPKEEP), "--model-name is for what looks into the registry"),
        ("version", ("promotion",), "--version is for promotion"),
        ("dry_run", ("promotion", "rollback"), "--dry-run is for what changes the registry alone"),
        ("fresh", ("champion",), "--known-levels is for champion"),
    ):
        value = getattr(args, name, None)
        if value is not None and args.pipeline not in of:
            raise ValueError(f"{rule}, not for {args.pipeline}; allowed: {', '.join(of)}")
        given |= {} if value is None else {name: value}
    if args.pipeline == "decoder" and args.command != "compile" and not {"data_uri", "model_uri"} <= given.keys():
        raise ValueError("decoder needs --data, a data set of larger frames, and --model, a trained world's folder")
    if args.pipeline == "curation" and args.command != "compile" and not {"data_uri", "labels_uri"} <= given.keys():
        raise ValueError(
            "curation needs --data, what was ingested from video, and --labels, what was said of its clips"
        )
    if args.pipeline == "video" and "source_uri" not in given and args.command != "compile":
        raise ValueError("video needs --source, where the videos lie: a folder, a bucket's prefix, or a manifest")
    if args.pipeline in STUDIES:
        from genie_model.studies import cells

        cells(args.pipeline, args.preset, args.set, args.seeds or [0], args.variants or [])  # is there such a study?
    if args.pipeline == "rollback":
        return {"dry_run": given.get("dry_run", False), "model_name": given.get("model_name", "genie")}
    return given


def _add_pipeline(command: argparse.ArgumentParser) -> None:
    command.add_argument("pipeline", choices=PIPELINES)
    command.add_argument("--seeds", type=_seed, nargs="+", help="of a study: a run of every variant for each")
    command.add_argument("--variant", dest="variants", action="append", help="of a study: only this (may be repeated)")
    command.add_argument(
        "--model", dest="model_uri", help="of cloning (default: trains one) and decoder: a trained world's folder"
    )
    command.add_argument(
        "--source", dest="source_uri", metavar="URI", help="of video: a folder or a manifest of videos"
    )
    command.add_argument(
        "--labels", dest="labels_uri", metavar="URI", help="of video and curation: what people said of the clips"
    )
    command.add_argument(
        "--eval",
        dest="eval_uri",
        metavar="URI",
        help="of curation: whose held-out videos to measure on, if not --data's",
    )
    command.add_argument(
        "--prompts", dest="prompts_uri", metavar="URI", help="of video: a folder of pictures to enter the world from"
    )
    command.add_argument(
        "--data",
        dest="data_uri",
        metavar="URI",
        help="of curation, promotion and champion: a data set of video; of decoder: of larger frames",
    )
    _add_model_name(command)
    command.add_argument("--version", help="of promotion: which one (default: the newest)")
    command.add_argument(
        "--dry-run", action="store_true", default=None, help="of promotion and rollback: change nothing in the registry"
    )
    command.add_argument(
        "--known-levels",
        dest="fresh",
        action="store_false",
        default=None,
        help="of champion: on the levels that versions are registered with, not on today's own",
    )


def _add_experiment(command: argparse.ArgumentParser) -> None:
    command.add_argument("--experiment", default="genie", help="MLflow experiment (default: genie)")


def _add_model_name(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model-name", help="the registered model (default: genie; of video: genie-video)")


def _add_host(command: argparse.ArgumentParser) -> None:
    command.add_argument("--host", required=True, help="URL of the Kubeflow Pipelines API")


def _add_name(command: argparse.ArgumentParser) -> None:
    command.add_argument("--name", help="of the recurring run (default: genie-PIPELINE)")


def _add_others(commands: Any) -> None:
    text = "have a Kubeflow Pipelines host no longer start it"
    command = commands.add_parser("unschedule", help=text, description=text)
    command.add_argument("pipeline", choices=PIPELINES)
    _add_experiment(command)
    _add_host(command)
    _add_name(command)

    text = "make the champion before the champion again, at once; no pipeline promotes the one that goes again"
    command = commands.add_parser("rollback", help="make the champion before the champion again", description=text)
    command.add_argument("--dry-run", action="store_true", help="say what would happen, and change nothing")
    _add_model_name(command)
    _add_store(command)

    command = commands.add_parser("report", help="make a study's report from MLflow", description="from MLflow alone")
    command.add_argument("pipeline", choices=STUDIES)
    _add_store(command)
    _add_experiment(command)
    command.add_argument("--run", help="the study's MLflow run (default: the one last asked for)")
    command.add_argument("--output", default="build", help="folder for NAME.html and NAME.md (default: build)")


def _add_store(command: argparse.ArgumentParser) -> None:
    command.add_argument("--tracking-uri", default="", help=f"{_TRACKING}, else that of --state)")
    command.add_argument("--state", default=".genie", help="folder whose MLflow store is read if no server is named")


def _port(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: 1 to 65535")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdigit() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a seed: 0 to {2**31 - 1}")
    return int(text)
