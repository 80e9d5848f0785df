"""`python -m serving`: serves the champion, or the model in --model-uri, and prints where to play it."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import sys

from pydantic import ValidationError
from pydantic_settings import CliApp

from genie_model.progress import summary
from serving.access import JsonLines
from serving.app import create_app
from serving.connections import server_of
from serving.settings import Settings


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status; 1 after one line that says what to do."""
    try:
        settings = CliApp.run(Settings, cli_args=sys.argv[1:] if arguments is None else arguments)
        set_up_logs(settings)
        listener = bind(settings.host, settings.port)  # before the model loads: a port in use shows at once
        app = create_app(settings)
        if not settings.wait:
            app.state.engine.models.refresh()
    except ValidationError as error:
        problems = [f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors()]
        return _refuse("; ".join(problems))
    except (ValueError, OSError, ImportError) as error:  # ImportError: a URI whose fsspec driver is not installed
        return _refuse(str(error))

    host = settings.host.replace("0.0.0.0", "localhost")
    summary("serve", f"play at http://{host}:{listener.getsockname()[1]} (Ctrl-C ends it)")
    server = server_of(app)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    return 0 if server.started else 1


def set_up_logs(settings: Settings) -> None:
    """Requests are logged in JSON only: on a person's screen they would bury the rest."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if settings.log_format == "json" else logging.Formatter("[%(name)s] %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of every odd form; they are answered
    if settings.log_format == "text":
        logging.getLogger("serving.access").setLevel(logging.WARNING)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ValueError, saying what to do, when the address cannot be had."""
    # asyncio turns Nagle's delay off (40 ms a frame) only on sockets that name their protocol
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()
        return listener
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"port {port} on {host} is in use: stop what uses it or choose another --port") from None
        raise ValueError(f"cannot listen on {host} port {port}: {error.strerror}") from None


def _refuse(reason: str) -> int:
    print(f"serving: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
