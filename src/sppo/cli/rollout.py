"""`sppo rollout serve`: sample for a learner elsewhere, which sends its weights (`rollout.engine = "served:url=…"`)."""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RecipeError, RunFailure, UserError
from ..recipe.config import Config
from ..spec import parse_spec
from ._shared import add_recipe_options, emit, overrides

if TYPE_CHECKING:
    from ..models.policy import Policy

LOOPBACK = ("127.0.0.1", "localhost", "::1")
ELSEWHERE = {"served": "samples on a server", "control": "keeps a table in the learner's process"}
"""Engines that cannot be served, and why."""


def add(subparsers: Any) -> None:
    """Register the command."""
    group = subparsers.add_parser("rollout", help="sample for a learner on another machine", description=__doc__)
    commands = group.add_subparsers(metavar="COMMAND", required=True)
    parser = commands.add_parser("serve", help="hold a model, and sample for a learner over HTTP", description=__doc__)
    add_recipe_options(parser)
    parser.add_argument("--engine", metavar="SPEC", help="local or vllm:key=value,…; default: the recipe's, else local")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on [127.0.0.1: this machine only; 0.0.0.0 for all]"
    )
    parser.add_argument("--port", type=int, help="port [8700]; 0 takes a free one")
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        help="holds the token; where there is no such file, one is made with a new token",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted."""
    from ..connections import bound
    from ..rollout.engine import load_engine
    from ..rollout.serve import Server
    from ..rollout.wire import PORT

    config, use = _config(args)
    token, where = _token(args.token_file)
    port = PORT if args.port is None else args.port
    with _usable(args.host, port):
        listener = bound(args.host, port)  # before the wait for a model; it listens when that is there
    with contextlib.closing(listener), _until_a_signal():
        policy = _policy(config, quiet=args.quiet)
        with contextlib.closing(load_engine(use, policy)) as engine:
            with _usable(args.host, port):
                server = Server(listener, policy, engine, use, token)
            _say(args, listener, policy.name, use, token, where)
            server.serve_forever()
            raise RunFailure("the HTTP server ended by itself; its reason is above")
    return 0


@contextlib.contextmanager
def _until_a_signal() -> Iterator[None]:
    """SIGINT and SIGTERM end what is inside, also where the parent process ignored them."""
    handled = {n: signal.signal(n, signal.default_int_handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)


def _config(args: argparse.Namespace) -> tuple[Config, str]:
    """The recipe, and the engine to serve: a learner's own recipe says `served`, which is this server."""
    changes = overrides(args)
    if args.recipe is None and "policy.model" not in changes:
        raise RecipeError("give a recipe (that of the run), or --model")
    config = Config.load(args.recipe, changes)
    use = args.engine or config.rollout.engine
    name = parse_spec(use, "sppo.rollout").name
    if name == "served" and not args.engine:
        return config, "local"
    if name in ELSEWHERE:
        raise RecipeError(f"--engine {use} cannot be served: it {ELSEWHERE[name]}; take local or vllm")
    return config, use


def _policy(config: Config, quiet: bool) -> Policy:
    """The model as a run of this recipe begins with it; its weights are replaced by the learner's."""
    import torch

    from ..memory import keep_memory
    from ..models.loading import pick_device
    from ..models.mlp import is_control
    from ..run.models import Parts, load_policy
    from ..threads import fitted

    if is_control(config.policy.model):
        raise RecipeError(f"policy.model = {config.policy.model!r} runs control tasks; only language models are served")
    keep_memory()
    torch.set_num_threads(config.run.threads or fitted(torch.get_num_threads()))

    def note(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr)

    return load_policy(config, Parts(), None, pick_device(), note)


@contextlib.contextmanager
def _usable(host: str, port: int) -> Iterator[None]:
    """Turn what is wrong with an address into a sentence."""
    try:
        yield
    except (OSError, OverflowError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}:{port}: {why}; choose another --port or --host") from None


def _token(file: str | None) -> tuple[str, str]:
    """The token, and where it is: in a file, in the environment (''), or made and nowhere yet ('made')."""
    from ..rollout.wire import TOKEN_VARIABLE, checked_token, read_token

    if file is None:
        given = os.environ.get(TOKEN_VARIABLE, "")
        return (checked_token(given, TOKEN_VARIABLE), "") if given else (secrets.token_urlsafe(24), "made")
    path = Path(file).expanduser().absolute()
    made = secrets.token_urlsafe(24)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        _only_ours(path)
        return read_token(path), str(path)
    except OSError as error:
        raise UserError(f"--token-file: {path} cannot be written: {error.strerror}") from None
    with os.fdopen(handle, "w") as stream:
        stream.write(made + "\n")
    return made, str(path)


def _only_ours(path: Path) -> None:
    """Raises UserError where somebody else may have written the token; warns where they may read it."""
    found = path.stat() if path.exists() else os.lstat(path)
    if found.st_uid not in (os.getuid(), 0) or found.st_mode & 0o022:
        raise UserError(f"--token-file: other users of this machine may have written {path}; name another file")
    if found.st_mode & 0o044:
        print(f"warning: {path} can be read by other users of this machine: chmod 600 {path}", file=sys.stderr)


def _say(args: argparse.Namespace, listener: socket.socket, model: str, use: str, token: str, where: str) -> None:
    """Where it listens, and what a learner needs."""
    from ..rollout.wire import TOKEN_VARIABLE

    host, port = (f"[{args.host}]" if ":" in args.host else args.host), listener.getsockname()[1]
    url, file = f"http://{host}:{port}", where if where not in ("", "made") else None
    shown = f"http://{socket.gethostname()}:{port}" if args.host in ("0.0.0.0", "::") else url
    lines = [f"rollout worker at {url}: {model}, engine {use}; Ctrl-C ends it"]
    if where == "made":
        lines.append(f"token, made for this run: {token}")
    option = f",token_file={file}" if file else ""
    setting = "" if file else f"{TOKEN_VARIABLE}={token if where == 'made' else '…'} and "
    lines.append(f'in a learner: {setting}rollout.engine = "served:url={shown}{option}"')
    if args.host not in LOOPBACK:
        lines.append(
            "anyone on the way sees the token, weights and samples, and could change them: put TLS in front of it"
        )
    result = {"url": url, "model": model, "engine": use, "token_file": file} | (
        {"token": token} if where == "made" else {}
    )
    emit(result, args.json, "" if args.quiet else "\n".join(lines))
    print(end="", flush=True)
