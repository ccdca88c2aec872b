"""`sppo report`: a run as one HTML file to keep or send (no network needed to read it), and a model card."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import UserError
from ._shared import emit


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("report", help="write a run as one HTML file, and a model card", description=__doc__)
    parser.add_argument("path", metavar="RUN", help="a run directory")
    parser.add_argument(
        "--out", metavar="DIR", help="where report.html and model-card.md go; default: the run directory"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write both."""
    from ..report.reader import open_runs
    from ..report.single import write

    [reader] = open_runs([args.path])
    folder = Path(args.out) if args.out else reader.path
    try:
        page, card = write(reader, folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; choose another --out") from None
    emit({"report": str(page), "card": str(card)}, args.json, f"{page}: open it in a browser\n{card}")
    return 0
