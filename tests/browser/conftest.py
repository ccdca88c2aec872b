"""A real run, served by the real command, opened in a real Chromium."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sppo.run.loop import train
from sppo.run.run import Run

from ..conftest import small_config

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def made_run(out: Path, **changes) -> Path:
    """A small run with a bootstrap, so that some answers are right."""
    keys = {
        "run.out": str(out), "training.steps": 6, "evaluation.every": 2, "evaluation.n": 32, "bootstrap.task": "chain:steps=1-2", "bootstrap.steps": 60,
        "bootstrap.lr": 5e-3, "rollout.prompts": 60, "rollout.max_tokens": 16, "run.checkpoint_every": 2,
    }  # fmt: skip
    job = Run.new(small_config(**keys | changes))
    train(job)
    job.close()
    return out


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    return made_run(tmp_path_factory.mktemp("browser") / "first")


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium: install it (make chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser):
    """A page that counts what goes wrong in it."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: (page.problems.append(f"dialog {dialog.message}"), dialog.dismiss()))
    yield page
    context.close()


@pytest.fixture(scope="session")
def serve():
    """Start `sppo view` on some runs; returns its address."""
    started, addresses = [], {}

    def start(*runs: Path, options: tuple[str, ...] = ()) -> str:
        if (key := (runs, options)) in addresses:
            return addresses[key]
        command = [sys.executable, "-m", "sppo.cli.main", "view", *map(str, runs), "--port", "0", *options]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "SPPO_VIEW_TOKEN": ""},
        )
        started.append(process)
        assert process.stdout is not None
        addresses[key] = process.stdout.readline().strip()
        return addresses[key]

    yield start
    for process in started:
        process.terminate()
        process.wait()
        process.stdout.close()
