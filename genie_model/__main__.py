"""Genie by itself: what a config amounts to, and its stages, in as many processes as torchrun starts.

python -m genie_model describe genie_11b --mesh fsdp=128,tensor=2
torchrun --nproc-per-node 8 -m genie_model train-world coinrun --set parallel.fsdp=8 --data URI ...
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from genie_model import files
from genie_model.config import Config
from genie_model.presets import get_preset, preset_names
from genie_model.progress import speaks

if TYPE_CHECKING:
    from genie_model.tracking import StepRun


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: after one line, 2 for what the user got wrong, as an unknown preset or missing data, and
    1 for what may go well another time, as a store that does not answer or a full disk."""
    args = _parser().parse_args(arguments)
    try:
        if args.command == "opt-out":
            from genie_model.data.opt_out import opt_out

            text = opt_out(args.data, args.ids)
        else:
            config = get_preset(args.preset).with_overrides(*args.set)
            text = {"describe": _describe, "prompts": _prompts}.get(args.command, _run)(args, config)
    except (ValueError, OSError) as error:
        print(f"genie_model: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    if speaks():
        print(text, flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m genie_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    describe = commands.add_parser("describe", help="parameters, FLOPs and memory, beside what the paper reports")
    describe.add_argument(
        "--mesh",
        metavar="data=N,fsdp=N,tensor=N",
        help="what a training step takes of each device of this mesh, instead",
    )
    collect = commands.add_parser("collect", help="record CoinRun; prints the data set's URI last")
    ingest = commands.add_parser("ingest", help="cut video files into clips; prints the data set's URI last")
    ingest.add_argument(
        "--source",
        required=True,
        metavar="URI",
        help="a folder of videos, a manifest of them (CSV, Parquet), or robot episodes (RLDS, LeRobot)",
    )
    tokenizer = commands.add_parser("train-tokenizer", help="train the video tokenizer; prints its URI last")
    world = commands.add_parser("train-world", help="co-train LAM and dynamics; prints the model's URI last")
    decoder = commands.add_parser(
        "train-decoder", help="train a larger decoder of the same tokens; prints its URI last"
    )
    curator = commands.add_parser(
        "train-curator", help="learn good clips from labels; prints the classifier's URI last"
    )
    score = commands.add_parser("score", help="have a classifier look at every clip; prints the scores' URI last")
    curate = commands.add_parser("curate", help="list the clips whose scores are good; prints the data set's URI last")
    prompts = commands.add_parser("prompts", help="enter a world from pictures (Figure 10); prints where the page lies")
    for command in commands.choices.values():
        command.add_argument("preset", help=f"one of {', '.join(preset_names())}")
        command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a config field")
    for command in (collect, ingest, tokenizer, world, decoder, curator, score, curate):
        command.add_argument("--root", required=True, metavar="URI", help="where data sets, models and checkpoints lie")
        command.add_argument(
            "--result",
            default="",
            metavar="URI",
            help="also write what is printed last there, for a pipeline that goes on: its MLflow run stays open",
        )
    for command in (tokenizer, world, decoder, curator, score, curate):
        command.add_argument("--data", required=True, metavar="URI", help="a data set")
    for command in (tokenizer, world, decoder):
        command.add_argument(
            "--tracking-uri", default="", help="an MLflow server; default: $MLFLOW_TRACKING_URI, or none"
        )
        command.add_argument("--experiment", default="genie", help="there; default: genie")
        command.add_argument(
            "--study", default={}, type=json.loads, metavar="JSON", help="where in a study the run belongs"
        )
    world.add_argument("--tokenizer", required=True, metavar="URI", help="a trained tokenizer")
    decoder.add_argument(
        "--tokenizer", required=True, metavar="URI", help="a trained tokenizer, or the world that was trained on it"
    )
    curator.add_argument("--labels", required=True, metavar="URI", help="a file that `python -m serving.label` wrote")
    score.add_argument("--classifier", required=True, metavar="URI", help="a trained classifier")
    score.add_argument(
        "--share", default=(0, 1), type=_share, metavar="I/N", help="the I-th of N jobs that score at once, 0/N first"
    )
    curate.add_argument("--scores", required=True, metavar="URI", help="of all clips")
    prompts.add_argument("--model", required=True, metavar="URI", help="a trained world model")
    prompts.add_argument("--images", default="", metavar="URI", help="a folder of pictures; default: samples made here")
    prompts.add_argument("--out", required=True, metavar="URI", help="a folder for page, pictures and figures")
    opt_out = commands.add_parser("opt-out", help="hide clips of a data set from all that reads it, from now on")
    opt_out.add_argument("--data", required=True, metavar="URI", help="a data set")
    opt_out.add_argument("ids", nargs="+", metavar="ID", help="a source's id, owner:NAME, or sha256:DIGEST of a clip")
    return parser


def _share(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no share: 0/4, 1/4, 2/4 and 3/4 are the four of four jobs")
    return int(index), int(count)


def _describe(args: argparse.Namespace, config: Config) -> str:
    if args.mesh is None:
        from genie_model.describe import describe

        return describe(config)
    from genie_model.backend.sharding import Mesh
    from genie_model.mesh_report import report

    return report(config, Mesh.parse(args.mesh))


def _prompts(args: argparse.Namespace, config: Config) -> str:
    from genie_model.prompts import play_prompts

    play_prompts(config, args.model, args.images).save(args.out, f"{args.model} from pictures")
    return f"{args.out}/index.html"


def _run(args: argparse.Namespace, config: Config) -> str:
    """The URI of what the stage made, which is whole by then; the first process leaves it at --result."""
    uri = _made(args, config)
    if args.result and speaks():
        files.write_atomic(args.result, uri.encode())
    return uri


def _made(args: argparse.Namespace, config: Config) -> str:
    if args.command == "collect":
        from genie_model.data.coinrun import collect

        return collect(config, args.root) if speaks() else ""  # two would rename each other's files
    if args.command == "ingest":
        from genie_model.data.ingest import ingest

        return ingest(config, args.source, args.root) if speaks() else ""
    if args.command in ("train-curator", "score", "curate"):
        from genie_model.data import curation

        if args.command == "train-curator":
            return curation.train_classifier(config, args.data, args.labels, args.root)
        if args.command == "score":
            return curation.score(config, args.data, args.classifier, args.root, share=args.share)
        return curation.curate(config, args.data, args.scores, args.root)
    from genie_model.enlarging import train_large_decoder
    from genie_model.train import train_tokenizer, train_world

    with ExitStack() as stack:
        run: StepRun | None = None
        if speaks() and (args.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")):
            from genie_model.tracking import step

            where = {"root_uri": args.root, "tracking_uri": args.tracking_uri, "experiment": args.experiment}
            ends = {"study": args.study, "ends_pipeline": not args.result}
            ends |= {"pipeline": "decoder"} if args.command == "train-decoder" else {}
            run = stack.enter_context(step(args.command, args.preset, args.set, **where, **ends))
            run.dataset(args.data)
        if args.command == "train-tokenizer":
            made, uri = "tokenizer", train_tokenizer(config, args.data, args.root, run)
        elif args.command == "train-decoder":
            made, uri = "large_decoder", train_large_decoder(config, args.data, args.tokenizer, args.root, run)
        else:
            made, uri = "world", train_world(config, args.data, args.tokenizer, args.root, run)
        if run:
            run.made(made, uri)
    return uri


if __name__ == "__main__":
    sys.exit(main())
