"""Eight steps of quickstart on an idle machine and beside one busy loop per core at the same nice, as shipped: how far from a fair share of one half.

Both start from the same supervised model and are interleaved, each round in processes of its own; seconds are those of the steps, without starting Python
and PyTorch. Run it with nothing else on the machine. Last line: one JSON object. `make bench-busy`
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
STEPS = 8


def train(folder: Path, *options: str) -> dict[str, object]:
    """The summary of one run of the command, with the environment as it is."""
    command = [sys.executable, "-m", "sppo.cli.main", "train", *options, "--out", str(folder), "--quiet", "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def started(recipe: str, folder: Path) -> str:
    """A recipe without the supervised start: its policy is what that start leaves."""
    import tomli_w

    from sppo.recipe.config import Config

    train(folder, recipe, "--steps", "1", "--evaluation.every", "0", "--evaluation.n", "8")
    tree = Config.load(recipe).model_dump(mode="json", exclude_none=True)
    tree.pop("bootstrap", None)
    tree["policy"]["model"] = str(folder / "checkpoints" / "step-000000" / "policy")
    tree["evaluation"] |= {"every": 0, "n": 8}
    tree["training"]["steps"] = STEPS
    path = folder / "steps.toml"
    path.write_text(tomli_w.dumps(tree))
    return str(path)


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """So many processes that do nothing but compute."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def processor() -> str:
    """What kind of processor this is: by what it multiplies with."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    kinds = ("amx_bf16", "avx512_bf16", "avx512_f", "avx2")
    return next((kind for kind in kinds if capabilities.get(kind)), capabilities.get("architecture", "unknown"))


def main() -> None:
    from sppo.threads import affinity

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds, cores = parser.parse_args().rounds, affinity()
    seconds: dict[str, list[float]] = {"idle": [], "busy": []}
    with tempfile.TemporaryDirectory(prefix="sppo-busy-") as work:
        recipe = started(str(RECIPE), Path(work, "start"))
        for turn in range(rounds):
            for name in ("idle", "busy") if turn % 2 == 0 else ("busy", "idle"):
                with busy_loops(cores if name == "busy" else 0):
                    summary = train(Path(work, f"{name}-{turn}"), recipe)
                seconds[name].append(float(summary["seconds"]))
                print(f"round {turn + 1}  {name}  {seconds[name][-1]:.1f} s", flush=True)
    idle, busy = (statistics.median(seconds[name]) for name in ("idle", "busy"))
    result = {
        "idle": round(idle, 2), "busy": round(busy, 2),
        "ratio": round(statistics.median(i / b for i, b in zip(*seconds.values(), strict=True)), 3),
        "rounds": rounds, "cores": cores, "nice": os.nice(0), "processor": processor(),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
