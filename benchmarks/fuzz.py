"""Asks the service all that its OpenAPI description allows, and much that it does not: no answer may be a 5xx.

    pipx install schemathesis
    python -m benchmarks.fuzz MODEL_FOLDER [--cases 10000] [--schemathesis PROGRAM]

Schemathesis makes the cases, evenly over all operations (those without inputs need but one), about a session that is
there, and says how each failure is asked again. DELETE is left out: it would end that session. Ends with Schemathesis's
own status: 0 when nothing was wrong.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

_PLENTY = "1000000"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder with config.json, model.safetensors and start_frames/")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--schemathesis", default="schemathesis", help="the program (default: schemathesis)")
    arguments = parser.parse_args()
    program = shutil.which(arguments.schemathesis)
    if program is None:
        parser.error(f"there is no program {arguments.schemathesis}: pipx install schemathesis")
    command = [sys.executable, "-m", "serving", "--port", "0", "--model-uri", arguments.model]
    command += ["--session-store", ":memory:", "--max-sessions", _PLENTY, "--max-rollouts", "1000"]
    for limit in ("sessions", "rollouts", "worlds-per-minute", "steps-per-minute"):
        command += [f"--client-{limit}", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        said = next((line for line in process.stdout if "http://" in line), "")
        if not said:
            parser.error(f"the service does not start with {arguments.model}")
        url = "http://" + said.split("http://")[1].split()[0]
        return _asked(program, url, arguments.cases)
    finally:
        process.terminate()
        process.wait(timeout=30)


def _asked(program: str, url: str, cases: int) -> int:
    with urllib.request.urlopen(f"{url}/openapi.json") as answer:
        operations = sum(len(methods) for methods in json.load(answer)["paths"].values())
    form = urllib.parse.urlencode({"start_frame": "00"}).encode()
    with urllib.request.urlopen(f"{url}/v1/sessions", form) as answer:
        session = json.load(answer)["id"]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "schemathesis.toml")
        config.write_text(f'[parameters]\n"path.session_id" = "{session}"\n')
        asked = [program, "--config-file", str(config), "run", f"{url}/openapi.json", "--workers", "2"]
        asked += ["--checks", "not_a_server_error", "--continue-on-failure", "--phases", "examples,fuzzing"]
        asked += ["--exclude-method", "DELETE", "--max-examples", str(max(cases // operations, 1))]
        return subprocess.run(asked, cwd=folder).returncode


if __name__ == "__main__":
    sys.exit(main())
