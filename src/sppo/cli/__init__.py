"""The command `sppo`: one file per subcommand, each with `add(subparsers)` and `run(args)`."""

import os
import sys

# `export PYTHONPATH=$PYTHONPATH:/x` leaves an empty entry, which Python takes for the current folder; see own.py. `.` is one that somebody wanted.
_entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
if len(_entries) > 1 and "" in _entries:
    _named = [entry for entry in _entries if entry]
    os.environ["PYTHONPATH"] = os.pathsep.join(_named)
    if os.getcwd() in sys.path and os.getcwd() not in map(os.path.abspath, _named):
        sys.path.remove(os.getcwd())
