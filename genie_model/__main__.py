"""`python -m genie_model describe PRESET`: what a config amounts to, before anything is trained."""

from __future__ import annotations

import argparse
import sys

from genie_model.presets import get_preset, preset_names


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 2 after one line for an unknown preset, field or axis, or a mesh that does not fit."""
    parser = argparse.ArgumentParser(prog="python -m genie_model", description=__doc__)
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "describe", help="parameters, FLOPs and memory of a preset, beside what the paper reports"
    )
    command.add_argument("preset", help=f"one of {', '.join(preset_names())}")
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a config field")
    command.add_argument(
        "--mesh",
        metavar="data=N,fsdp=N,tensor=N",
        help="what a training step takes of each device of this mesh, instead",
    )
    args = parser.parse_args(arguments)
    try:
        config = get_preset(args.preset).with_overrides(*args.set)
        if args.mesh is None:
            from genie_model.describe import describe

            print(describe(config))
        else:
            from genie_model.backend.sharding import Mesh
            from genie_model.slices import report

            print(report(config, Mesh.parse(args.mesh)))
    except ValueError as error:
        print(f"genie_model: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
