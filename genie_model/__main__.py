"""`python -m genie_model describe PRESET`: what a config amounts to, before anything is trained."""

from __future__ import annotations

import argparse
import sys

from genie_model.presets import get_preset, preset_names


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 2 after one line for an unknown preset or field."""
    parser = argparse.ArgumentParser(prog="python -m genie_model", description=__doc__)
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "describe", help="parameters, FLOPs and memory of a preset, beside what the paper reports"
    )
    command.add_argument("preset", help=f"one of {', '.join(preset_names())}")
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a config field")
    command.add_argument("--devices", type=int, default=1, help="that share the training (default: 1)")
    args = parser.parse_args(arguments)
    try:
        if args.devices < 1:
            raise ValueError(f"--devices {args.devices}: at least 1")
        config = get_preset(args.preset).with_overrides(*args.set)
    except ValueError as error:
        print(f"genie_model: {error}", file=sys.stderr)
        return 2
    from genie_model.describe import describe

    print(describe(config, args.devices))
    return 0


if __name__ == "__main__":
    sys.exit(main())
