"""What training a preset costs on TPUs, from its counted FLOPs: the table of docs/costs.md.

    python -m benchmarks.costs [PRESET ...] [--share 0.4] [--price v5p=4.20]

Chip-hours are the FLOPs of all steps over the chip's dense bfloat16 peak times the share of it that training reaches,
which is assumed (`--share`) and was not measured here. Prices are dollars of a chip-hour, on demand.
"""

from __future__ import annotations

import argparse

from tqdm import tqdm

from genie_model.describe import short, sizes
from genie_model.presets import get_preset, preset_names
from genie_model.slices import TPUS

# Google's list prices in US regions as its authors knew them; cloud.google.com/tpu/pricing has today's.
PRICES = {"v5e": 1.20, "v5p": 4.20, "v6e": 2.70}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.costs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("presets", nargs="*", metavar="PRESET", help="default: all but tiny")
    parser.add_argument("--share", type=_share, default=0.4, help="of the peak that training reaches (default: 0.4)")
    parser.add_argument("--price", type=_price, action="append", default=[], metavar="CHIP=DOLLARS")
    args = parser.parse_args(arguments)
    prices = PRICES | dict(args.price)
    try:
        configs = [get_preset(name) for name in args.presets or preset_names() if args.presets or name != "tiny"]
    except ValueError as error:
        parser.error(str(error))

    chips = [tpu for tpu in TPUS.values() if tpu.name in prices]
    titles = ["preset", "parameters", "FLOPs, tokenizer", "FLOPs, world"]
    titles += [f"{tpu.name}, chip-hours" for tpu in chips] + [f"{tpu.name}, $" for tpu in chips]
    rows = []
    for config in tqdm(configs, desc="costs", unit="preset", leave=False):
        counted = sizes(config)
        tokenizer, world = counted["flops_train_tokenizer"], counted["flops_train_world"]
        hours = [(tokenizer + world) / (tpu.flops * args.share) / 3600 for tpu in chips]
        dollars = [hour * prices[tpu.name] for hour, tpu in zip(hours, chips, strict=True)]
        figures = [short(counted["parameters"]), short(tokenizer), short(world), *map(rounded, hours + dollars)]
        rows.append([f"`{config.name}`", *figures])
    for row in (titles, ["---"] * len(titles), *rows):
        print("| " + " | ".join(row) + " |")


def rounded(x: float) -> str:
    """Two digits are more than an assumed share bears."""
    return f"{float(f'{x:.2g}'):,.0f}" if x >= 10 else f"{x:.2g}"


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: above 0, at most 1")
    return share


def _price(text: str) -> tuple[str, float]:
    chip, _, dollars = text.partition("=")
    known = [tpu.name for tpu in TPUS.values()]
    if chip not in known:
        raise argparse.ArgumentTypeError(f"{chip!r} is no chip: one of {', '.join(known)}")
    try:
        return chip, float(dollars)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{dollars!r} is no price in dollars") from None


if __name__ == "__main__":
    main()
