"""The worker's side of `rewards/workers.py`: import one function, then answer one JSON line with one JSON line.

The module's `warm_up()`, if it has one, runs before the worker reports that it is ready, so slow imports do not count
as a slow verdict.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import threading
import time

MEMORY = 4 << 30
"""Address space of a worker: an expression that explodes ends here, not in the trainer."""


def main() -> None:
    """Serve until the pipe closes. Whatever the judged libraries print goes to stderr: stdout carries answers only."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.set_int_max_str_digits(20_000)
    sys.setrecursionlimit(5_000)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    module, _, name = sys.argv[1].partition(":")
    target = importlib.import_module(module)
    function = getattr(target, name)
    getattr(target, "warm_up", lambda: None)()
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


def _end_with_parent(parent: int) -> None:
    """A trainer that is killed cannot end its workers, and a hanging expression would burn a core for ever."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)


if __name__ == "__main__":
    main()
