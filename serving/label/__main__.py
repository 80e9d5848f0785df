"""Label clips of a data set, 5 (clear gameplay) to 1 (menus, faces, no game), for the classifier that curates it.

    python -m serving.label --data .genie/datasets/video-0123 --labels labels.json

The file is whole after every key; the same command goes on where it ended.
"""

from __future__ import annotations

import argparse
import contextlib
import sys

import uvicorn
from filelock import FileLock, Timeout

from genie_model import files
from genie_model.progress import summary
from serving.__main__ import bind
from serving.label.app import create_app
from serving.label.clips import Clips


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status; 1 after one line that says what to do."""
    parser = argparse.ArgumentParser(
        prog="python -m serving.label", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, metavar="URI", help="a data set of video; its train clips are shown")
    parser.add_argument("--labels", required=True, metavar="FILE", help="the JSON file to write, or to go on with")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8010, help="port to listen on; 0 takes a free one (default: 8010)")
    args = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        try:
            if files.is_local(args.labels):
                stack.enter_context(FileLock(f"{args.labels}.lock", timeout=0))
            listener = stack.enter_context(bind(args.host, args.port))
            app = create_app(Clips(args.data, args.labels), [args.host])
        except Timeout:
            return _refuse(f"another process labels into {args.labels}: end it, or name another file")
        except (ValueError, OSError, ImportError) as error:  # ImportError: a URI whose fsspec driver is not installed
            return _refuse(str(error))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2))
        host = args.host.replace("0.0.0.0", "localhost")
        summary("label", f"label at http://{host}:{listener.getsockname()[1]} (Ctrl-C ends it); kept in {args.labels}")
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    return 0


def _refuse(reason: str) -> int:
    print(f"serving.label: {' '.join(reason.split())}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
