"""What a verdict costs: trivial programs through the sandbox. Last line: one JSON object. `make bench-sandbox`"""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from collections.abc import Callable

from sppo.sandbox import Case, Job, Sandbox, TestCode, asserts, calls

GATES = {"p50_ms": 8.0, "p95_ms": 25.0, "asserts_p50_ms": 25.0, "slot_start_ms": 250.0}


def milliseconds(run: Callable[[], object], n: int) -> list[float]:
    """n timings of one call each."""
    out = []
    for _ in range(n):
        began = time.perf_counter()
        run()
        out.append((time.perf_counter() - began) * 1000)
    return sorted(out)


def main() -> None:
    starts = []
    for _ in range(5):
        began = time.perf_counter()
        with Sandbox(slots=1):
            starts.append((time.perf_counter() - began) * 1000)
    program = "def f(x):\n    return x + 1"
    with Sandbox(slots=1) as one:
        script = Job("script", "print(1)")
        milliseconds(lambda: one.run([script]), 20)
        alone = milliseconds(lambda: one.run([script]), 400)
        call = milliseconds(lambda: calls(one, [(program, [Case(2, entry="f", args=[1])])]), 200)
        test = TestCode(["assert f(1) == 2", "assert f(2) == 3", "assert f(-1) == 0"])
        pair = milliseconds(lambda: asserts(one, [(program, test)]), 200)
    with Sandbox(slots=2) as two:
        two.run([script] * 100)
        before = len(os.listdir("/proc/self/fd")), threading.active_count()
        began = time.perf_counter()
        results = two.run([script] * 1000)
        seconds = time.perf_counter() - began
        after = len(os.listdir("/proc/self/fd")), threading.active_count()
    result = {
        "p50_ms": round(statistics.median(alone), 2),
        "p95_ms": round(alone[int(0.95 * len(alone))], 2),
        "calls_p50_ms": round(statistics.median(call), 2),
        "asserts_p50_ms": round(statistics.median(pair), 2),
        "slot_start_ms": round(statistics.median(starts), 1),
        "programs_per_s": round(1000 / seconds, 1),
        "slots": 2,
        "leaked_descriptors": after[0] - before[0],
        "leaked_threads": after[1] - before[1],
        "all_ok": all(r.status == "ok" for r in results),
    }
    for name, gate in GATES.items():
        print(f"{name:<18} {result[name]:>8}   gate {gate:g}")
    print(f"{'programs_per_s':<18} {result['programs_per_s']:>8}   gate 150")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
