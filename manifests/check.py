"""`python -m manifests.check`, or `make manifests`: renders every overlay into build/manifests and checks it.

No cluster is asked. Exits with 1 on any finding, and 2 where there is no kustomize or an overlay does not render.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from manifests import links, pods
from manifests.objects import FOLDER, OVERLAYS, Objects, overlays, render
from manifests.schema import schema

BUILD = FOLDER.parent / "build" / "manifests"
CHECKOV_CONFIG = FOLDER / "checkov.yaml"
RULES = (*pods.RULES, *links.RULES)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="make manifests", description=__doc__)
    parser.add_argument("--checkov", type=Path, help="the program, to have it look at what was rendered")
    args = parser.parse_args(arguments)
    BUILD.mkdir(parents=True, exist_ok=True)
    for path in BUILD.glob("*.yaml"):  # of overlays that are no more
        path.unlink()
    problems = 0
    for overlay in overlays():
        try:
            text = render(OVERLAYS / overlay)
        except ValueError as error:
            print(f"manifests: {error}", file=sys.stderr)
            return 2
        (BUILD / f"{overlay}.yaml").write_text(text)
        objects = Objects.read(text)
        found = list(findings(objects, overlay))
        kinds = Counter(one["kind"] for one in objects.all)
        print(f"[manifests] {overlay}: {len(objects.all)} objects of {len(kinds)} kinds, {len(found)} findings")
        for problem in found:
            print(f"  {problem}")
        problems += len(found)
    if args.checkov and args.checkov.exists():
        found, summary = checkov(args.checkov)
        print(f"[manifests] checkov: {summary}")
        for problem in found:
            print(f"  {problem}")
        problems += len(found)
    else:
        print("[manifests] checkov is not here: its checks were not made (see `make manifests`)")
    print(f"[manifests] {problems} findings; the YAML is in {BUILD.relative_to(FOLDER.parent)}")
    return 1 if problems else 0


def findings(objects: Objects, overlay: str) -> Iterator[str]:
    """All that is wrong with an overlay, in words; rules take objects that fit their schemas for granted."""
    wrong = list(schema(objects.all))
    yield from wrong
    if wrong:
        return
    for rule in RULES:
        try:
            yield from rule(objects)
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # a form that no overlay had before
            yield f"rule `{rule.__name__}` cannot read an object: {error!r}"
    if not (OVERLAYS / overlay / "cluster.toml").exists():
        yield "cluster.toml is missing: pipelines run by it"
    for path in sorted((OVERLAYS / overlay).glob("*.toml")):
        try:
            cluster = tomllib.loads(path.read_text())
        except tomllib.TOMLDecodeError as error:
            yield f"{path.name}: {error}"
        else:
            yield from (f"{path.name}: {problem}" for problem in links.cluster(objects, settings(overlay), cluster))


def settings(overlay: str) -> dict[str, str]:
    """An overlay's settings.env."""
    path = OVERLAYS / overlay / "settings.env"
    lines = path.read_text().splitlines() if path.exists() else []
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def checkov(program: Path) -> tuple[list[str], str]:
    """What it finds in build/manifests, and its counts. What it skips, annotations and checkov.yaml explain."""
    command = [program, "--directory", BUILD, "--config-file", CHECKOV_CONFIG, "--output", "json"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    try:
        report = json.loads(done.stdout)
        found = [
            f"{one['resource']}: {one['check_id']} {one['check_name']}" for one in report["results"]["failed_checks"]
        ]
        counts = report["summary"]
    except (ValueError, KeyError, TypeError):
        return [f"checkov itself failed: {(done.stderr or done.stdout)[-300:].strip()}"], "no answer"
    return found, ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped"))


if __name__ == "__main__":
    sys.exit(main())
