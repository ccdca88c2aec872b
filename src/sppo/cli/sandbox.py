"""`sppo sandbox serve`: run programs for trainers on other machines (reward `code:backend=remote,url=…`)."""

from __future__ import annotations

import argparse
import os
import secrets
import signal
from typing import Any

from ..errors import UserError
from ._shared import emit


def add(subparsers: Any) -> None:
    """Register the command."""
    group = subparsers.add_parser("sandbox", help="serve the sandbox to other machines", description=__doc__)
    commands = group.add_subparsers(metavar="COMMAND", required=True)
    parser = commands.add_parser("serve", help="answer jobs over HTTP", description=__doc__)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on [127.0.0.1: this machine only; 0.0.0.0 for all]"
    )
    parser.add_argument("--port", type=int, default=8790, help="port [8790]; 0 takes a free one")
    parser.add_argument("--slots", type=int, default=os.cpu_count() or 2, help="programs at a time [one per core]")
    parser.add_argument("--backend", default="bwrap", help="bwrap, landlock or unsafe-subprocess [bwrap]")
    parser.add_argument("--wall", type=float, default=30.0, help="most wall-clock seconds that a job may ask for [30]")
    parser.add_argument("--cpu", type=int, default=30, help="most processor seconds that a job may ask for [30]")
    parser.add_argument("--memory-mb", type=int, default=2048, help="most memory a program may ask for [2048]")
    parser.add_argument("--fork", action="store_true", help="programs may start processes if a job asks")
    parser.add_argument("--json", action="store_true", help="one JSON object once it listens")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted."""
    from ..sandbox import Limits, Sandbox
    from ..sandbox.remote import TOKEN_VARIABLE
    from ..sandbox.serve import Server

    token = os.environ.get(TOKEN_VARIABLE, "")
    made = not token
    if made:
        token = secrets.token_urlsafe(24)
    elif len(token) < 16:
        raise UserError(
            f"{TOKEN_VARIABLE} has {len(token)} characters; take 16 or more, or leave it unset and one is made"
        )
    if min(args.slots, args.cpu, args.memory_mb) < 1 or args.wall <= 0:
        raise UserError("--slots, --wall, --cpu and --memory-mb must be above 0")
    limits = Limits(cpu_seconds=args.cpu, wall_seconds=args.wall, memory_bytes=args.memory_mb << 20, fork=args.fork)
    with Sandbox(args.backend, args.slots, limits) as sandbox:
        try:
            server = Server((args.host, args.port), sandbox, token)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"cannot listen on {args.host}:{args.port}: {error}; choose another --port or --host"
            ) from None
        host = f"[{args.host}]" if ":" in args.host else args.host
        url = f"http://{host}:{server.server_address[1]}"
        lines = [f"sandbox at {url}: {args.slots} slots, {args.backend}; Ctrl-C ends it"]
        if made:
            lines.append(f"token, made for this run: {token}")
        lines.append(
            f'in a trainer: {TOKEN_VARIABLE}={"…" if not made else token} and reward.use = "code:backend=remote,url={url}"'
        )
        if args.host not in ("127.0.0.1", "localhost", "::1"):
            lines.append("anyone who can reach this address sees the token and the programs: put TLS in front of it")
        emit(
            {"url": url, "slots": args.slots, "backend": args.backend} | ({"token": token} if made else {}),
            args.json,
            "\n".join(lines),
        )
        print(end="", flush=True)
        for number in (signal.SIGINT, signal.SIGTERM):  # also where the parent process ignored them
            signal.signal(number, signal.default_int_handler)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            server.server_close()
    return 0
