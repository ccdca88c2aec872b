"""How long do the pages of a long run take? A run of 1,000 steps and 256,000 rollouts is made of a finished run's steps; each page is loaded by
a browser, cold and warm, if playwright is there; else by HTTP alone.

    python benchmarks/view.py runs/quickstart
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

PAGES = ("/", "/rollouts", "/rollouts?surprised=1&order=surprise", "/rollouts/500/7", "/critic", "/health")
PORT = 8799


def stretch(run: Path, out: Path, steps: int) -> int:
    """A run of `steps` steps whose step s is the source's s modulo its length. Returns the number of rollouts."""
    (out / "rollouts").mkdir(parents=True)
    for name in ("recipe.toml", "summary.json"):
        shutil.copy(run / name, out / name)
    shutil.copytree(run / "checkpoints", out / "checkpoints")
    files = sorted((run / "rollouts").glob("*.parquet"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    with (out / "metrics.jsonl").open("w") as file:
        for step in range(steps):
            os.link(files[step % len(files)], out / "rollouts" / f"step-{step:06d}.parquet")
            file.write(json.dumps({**lines[step % len(lines)], "step": step}) + "\n")
    import pyarrow.parquet as pq

    return sum(pq.read_metadata(p).num_rows for p in files) * steps // len(files)


def by_http(base: str) -> dict[str, list[float]]:
    """Seconds of the first and of later answers."""
    found: dict[str, list[float]] = {}
    for _ in range(3):
        for page in PAGES:
            began = time.perf_counter()
            urllib.request.urlopen(base + page).read()
            found.setdefault(page, []).append(time.perf_counter() - began)
    return found


def by_browser(base: str) -> dict[str, list[float]]:
    """Seconds until the page's load event, in a fresh context each (nothing cached); and, as `… drawn`, until its first figure is there."""
    from playwright.sync_api import sync_playwright

    found: dict[str, list[float]] = {}
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        for _ in range(3):
            for page in PAGES:
                context = browser.new_context()
                tab = context.new_page()
                began = time.perf_counter()
                tab.goto(base + page, wait_until="load")
                found.setdefault(page, []).append(time.perf_counter() - began)
                if page in ("/", "/critic", "/health"):
                    tab.wait_for_selector("[data-drawn]")
                    found.setdefault(f"{page} drawn", []).append(time.perf_counter() - began)
                context.close()
        browser.close()
    return found


def main() -> None:
    """Make the run, serve it, load it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.run.parent) as folder:
        out = Path(folder) / "long"
        rollouts = stretch(args.run, out, args.steps)
        command = [sys.executable, "-m", "sppo.cli.main", "view", str(out), "--port", str(PORT)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert server.stdout is not None
            base = server.stdout.readline().strip().rstrip("/")
            for _ in range(100):
                try:
                    urllib.request.urlopen(base + "/static/style.css").read()
                    break
                except OSError:
                    time.sleep(0.05)
            http = by_http(base)
            browser = by_browser(base) if shutil.which("chromium") else {}
        finally:
            server.terminate()
    for page in dict.fromkeys([*PAGES, *browser]):
        print(
            page,
            "http",
            [f"{s:.2f}" for s in http.get(page, [])],
            "browser",
            [f"{s:.2f}" for s in browser.get(page, [])],
        )
    slowest = max(max(v) for k, v in (browser or http).items() if not k.endswith("drawn"))
    print(
        json.dumps({"steps": args.steps, "rollouts": rollouts, "slowest_s": slowest, "http": http, "browser": browser})
    )


if __name__ == "__main__":
    main()
