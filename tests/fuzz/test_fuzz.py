"""A hundredth of `make fuzz`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_damaged_recipes_rows_models_and_runs_end_in_a_sentence():
    command = [sys.executable, "-m", "tests.fuzz.run", "--share", "0.01"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
