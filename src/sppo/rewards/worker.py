"""The worker's side of `rewards/workers.py`: import one function, then answer one JSON line with one JSON line."""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys

MEMORY = 4 << 30
"""Address space of a worker: an expression that explodes ends here, not in the trainer."""


def main() -> None:
    """Serve until the pipe closes. Whatever the judged libraries print goes to stderr: stdout carries answers only."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.set_int_max_str_digits(20_000)
    sys.setrecursionlimit(5_000)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    module, _, name = sys.argv[1].partition(":")
    function = getattr(importlib.import_module(module), name)
    print(json.dumps({"ok": "ready"}), file=answers)
    for line in sys.stdin:
        try:
            answer = {"ok": function(json.loads(line))}
            text = json.dumps(answer)
        except MemoryError:
            text = json.dumps({"error": "out of memory"})
        except Exception as error:
            text = json.dumps({"error": f"{type(error).__name__}: {error}"[:500]})
        print(text, file=answers, flush=True)


if __name__ == "__main__":
    main()
