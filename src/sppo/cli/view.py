"""`sppo view`: a run (or several) in the browser, live: accuracy, every rollout, the critic, the health of the updates."""

from __future__ import annotations

import argparse
import os
import secrets
import socket
import sys
from typing import Any

from ..errors import UserError

PORT, TRIES = 8765, 20


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "view", help="look at runs in the browser, while they train or later", description=__doc__
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories; several are overlaid")
    parser.add_argument("--port", type=int, help=f"default: {PORT}, or the next free one")
    parser.add_argument(
        "--host", default="127.0.0.1", help="an address other than loopback asks visitors for a token [127.0.0.1]"
    )
    parser.add_argument("--token", help="the token; default: $SPPO_VIEW_TOKEN, or a fresh one where it is needed")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted."""
    import uvicorn

    from ..report.live import LOOPBACK, application
    from ..report.reader import open_runs

    runs = open_runs(args.runs)
    outside = args.host not in LOOPBACK
    token = args.token or os.environ.get("SPPO_VIEW_TOKEN") or (secrets.token_urlsafe(16) if outside else None)
    listener = _listen(args.host, args.port)
    host, port = ("[::1]" if ":" in args.host else args.host), listener.getsockname()[1]
    shown = socket.gethostname() if args.host in ("0.0.0.0", "::") else host
    print(f"http://{shown}:{port}/" + (f"?token={token}" if token else ""), flush=True)
    print("Ctrl-C stops the page; the run continues.", file=sys.stderr)
    config = uvicorn.Config(application(runs, token), log_level="warning", access_log=False, lifespan="off")
    server = uvicorn.Server(config)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    finally:
        listener.close()
    return 0


def _listen(host: str, port: int | None) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in [port] if port is not None else range(PORT, PORT + TRIES):
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, candidate))
        except (OSError, OverflowError) as error:
            listener.close()
            why = error
            continue
        listener.listen(128)
        return listener
    where = f"port {port}" if port is not None else f"ports {PORT} to {PORT + TRIES - 1}"
    raise UserError(
        f"{where} of {host} cannot be used: {getattr(why, 'strerror', None) or why}; choose another --port or --host"
    )
