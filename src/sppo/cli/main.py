"""`sppo`: parses, dispatches, and turns errors into one sentence and an exit code (0 done, 2 the user's mistake, 1 a
failure)."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any, NoReturn

from .. import __version__
from ..errors import RunFailure, UserError
from . import (
    audit,
    compare,
    critic,
    data,
    doctor,
    evaluate,
    export,
    pull,
    report,
    reward_model,
    rollout,
    sandbox,
    sft,
    solve,
    train,
    verify,
    view,
)

COMMANDS = (
    train, sft, evaluate, compare, verify, solve, view, report, audit, export, critic, reward_model, rollout, sandbox, pull, data, doctor,
)  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse with a one-line error instead of a page of usage, and no guessing from abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(
        prog="sppo",
        description="Train a language model to reason with sequence-level PPO: one verified answer at a time.",
        epilog="Start here: sppo train recipes/quickstart.toml",
    )
    parser.add_argument("--version", action="version", version=f"sppo {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for command in COMMANDS:
        command.add(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    as_json = "--json" in arguments
    try:
        args, extra = build_parser().parse_known_args(arguments)
        if extra and not getattr(args, "takes_keys", False):
            raise UserError(f"unrecognised argument {extra[0]!r} (see sppo {arguments[0]} --help)")
        args.extra = extra
        return args.run(args)
    except UserError as error:
        return _report("error", str(error), 2, as_json)
    except RunFailure as error:
        return _report("failed", str(error), 1, as_json)
    except (MemoryError, RuntimeError) as error:
        if (
            not isinstance(error, MemoryError)
            and "out of memory" not in str(error)
            and "can't allocate memory" not in str(error)
        ):
            raise
        advice = "lower training.micro_tokens or rollout.batch (sppo doctor RECIPE plans the memory), then resume"
        return _report("failed", f"out of memory; {advice}", 1, as_json)
    except KeyboardInterrupt:
        return _report("stopped", "interrupted before anything was running", 130, as_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _report(kind: str, message: str, code: int, as_json: bool) -> int:
    print(f"{kind}: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({kind: message, "exit": code}))
    return code


if __name__ == "__main__":
    sys.exit(main())
