"""`make fuzz`: damaged recipes, rows, model folders and run folders through the commands that read them.

Every case must end with a result or with one sentence: no traceback, no hang, no crash, and nothing in a file may run as code. Each case derives from
(seed, kind, number) alone. `python -m tests.fuzz.run --only rows:17` repeats one and keeps its folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1"}

from sppo.cli.main import main
from sppo.errors import UserError
from tests.fuzz import mutate

KINDS = {"recipes": 2000, "rows": 850, "models": 400, "runs": 500}
LIMIT = 30.0
"""Seconds that a case may take. What is not damaged takes one or two."""
MEMORY = 12 << 30
RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = {
    "policy": {"model": "tiny:hidden=16,layers=1,heads=2"},
    "critic": {"model": "tiny:hidden=16,layers=1,heads=2"},
    "rollout": {"prompts": 4, "max_tokens": 8, "batch": 4},
    "training": {"steps": 2, "minibatches": 1},
    "evaluation": {"n": 4, "every": 0, "samples": 1},
}
FEW = {
    "training.steps": 1,
    "rollout.prompts": 4,
    "rollout.samples": 1,
    "rollout.max_tokens": 8,
    "evaluation.n": 4,
    "evaluation.samples": 1,
}
"""What a recipe that is still sound would make long, not wrong."""
ROWS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("answer", {"question": "1+1?", "answer": "2", "response": "Answer: 2"}),
    ("answer:mode=choice", {"question": "Which?", "answer": "B", "choices": ["x", "y", "z"], "response": "It is (B) y."}),
    ("answer:mode=set", {"prompt": "Both?", "answer": ["1", "2"], "response": "{2, 1}"}),
    ("math", {"prompt": [{"role": "user", "content": "Half?"}], "answer": "\\frac{1}{2}", "response": "\\boxed{0.5}"}),
    ("math", {"question": "x", "reward_model": {"ground_truth": "(1, 2)", "style": "rule"}, "response": "\\boxed{(1,2)}"}),
    ("code", {"question": "Square.", "tests": ["assert f(3) == 9"], "entry_point": "f", "response": "```python\ndef f(x): return x * x\n```"}),
    ("code", {"question": "Add.", "tests": [{"input": "1 2\n", "output": "3\n"}], "response": "```python\nprint(sum(map(int, input().split())))\n```"}),
    ("code", {"prompt": "def f(x):\n", "test": "def check(c):\n    assert c(2) == 4\n", "entry_point": "f", "response": "    return x * 2\n"}),
    ("code", {"question": "q", "input_output": '{"fn_name": "f", "inputs": [[1]], "outputs": [2]}', "response": "```python\ndef f(x): return 2\n```"}),
    ("quality", {"question": "Write f.", "response": "```python\ndef f(x):\n    return x\n```"}),
    ("answer", {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2?"}], "answer": 2, "response": "2"}),
    ("steps:check=arithmetic,split=lines", {"question": "q", "answer": "4", "response": "1+1=2\n2+2=4"}),
)  # fmt: skip


class Canary:
    """Unpickled, it leaves a file behind: what loads it runs a stranger's code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch RAN",)


@dataclass(frozen=True)
class Result:
    """How one case ended: ok, sentence, traceback, hang, crashed, executed, or asked (whether a model's own code may run)."""

    kind: str
    number: int
    outcome: str
    arguments: tuple[str, ...]
    text: str
    seconds: float

    @property
    def bad(self) -> bool:
        return self.outcome not in ("ok", "sentence")


def preload() -> None:
    """Import what the commands import when they run, so that a fork need not."""
    import datasets
    import pyarrow.parquet
    import torch
    import transformers.models.auto.modeling_auto
    import transformers.models.llama.modeling_llama

    import sppo
    import sppo.report.live
    import sppo.report.single
    import sppo.rewards.code
    import sppo.rewards.quality
    import sppo.run.loop
    import sppo.run.run

    torch.set_num_threads(1)
    assert all((datasets, pyarrow.parquet, transformers, sppo))


class Originals:
    """What is damaged: a finished run, with its models, made once."""

    def __init__(self, folder: Path) -> None:
        self.run = folder / "run"
        code = self._train()
        if code:
            raise SystemExit(f"the run to be damaged could not be made: exit {code}")
        self.model = sorted((self.run / "checkpoints").iterdir())[-1] / "policy"

    def _train(self) -> int:
        """In a process of its own: OpenMP's threads do not survive a fork, and every case is one."""
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(SystemExit):
                tree = SMALL | {
                    "task": {"train": "chain:steps=1-2"},
                    "run": {"out": str(self.run), "checkpoint_every": 1, "keep": 2},
                }
                tree["evaluation"] = {"n": 4, "every": 1}
                path = self.run.parent / "recipe.toml"
                path.write_text(tomli_w.dumps(tree))
                code = main(["train", str(path), "--quiet"])
            os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def lay_out(kind: str, rng: random.Random, originals: Originals, folder: Path) -> list[str]:
    """Write the damaged input of one case into its folder; the command that reads it."""
    (folder / "evil.py").write_text("open('RAN', 'w')\n")  # a module that only auto_map or a stray import would load
    return {"recipes": _recipe, "rows": _rows, "models": _model, "runs": _run}[kind](rng, originals, folder)


def _recipe(rng: random.Random, originals: Originals, folder: Path) -> list[str]:
    path = folder / "recipe.toml"
    tree = tomllib.loads(rng.choice(sorted(RECIPES.glob("*.toml"))).read_text())
    for section, keys in SMALL.items():
        if not (section in ("policy", "critic") and "mlp" in str(tree.get(section))):
            tree[section] = {**tree.get(section, {}), **keys}
    if "bootstrap" in tree:
        tree["bootstrap"] |= {"steps": 2, "batch": 2}
    if rng.random() < 0.8:
        path.write_text(tomli_w.dumps(mutate.plain(mutate.damage_tree(rng, tree, most=rng.choice((1, 1, 3))))))
    else:
        path.write_bytes(mutate.damage_bytes(rng, tomli_w.dumps(tree).encode()))
    if rng.random() < 0.75 or "mlp" in str(tree):  # a control task clones its teacher for a minute or two
        return ["doctor", str(path)]
    few = [word for key, value in FEW.items() for word in (f"--{key}", str(value))]
    if "bootstrap" in tree:
        few += ["--bootstrap.steps", "2"]
    return ["train", str(path), "--out", "out", *few]


def _rows(rng: random.Random, originals: Originals, folder: Path) -> list[str]:
    reward, row = rng.choice(ROWS)
    rows = [mutate.damage_tree(rng, row, most=2) if rng.random() < 0.7 else row for _ in range(rng.randint(1, 4))]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    what = rng.random()
    if what < 0.15:
        path.write_bytes(mutate.damage_bytes(rng, path.read_bytes()))
    elif what < 0.25:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = folder / "rows.parquet"
        pq.write_table(pa.Table.from_pylist([row, row]), path)
        mutate.damage_file(rng, path)
    if reward == "code" and rng.random() < 0.7:
        reward = "answer"  # a jail takes a second to start
    command = rng.choice(("check", "check", "verify", "verify", "train"))
    if command == "check":
        return ["data", "check", str(path), "--reward", reward]
    if command == "verify":
        return ["verify", str(path), "--reward", reward]
    few = [word for key, value in FEW.items() for word in (f"--{key}", str(value))]
    small = [word for s in ("policy", "critic") for word in (f"--{s}.model", SMALL[s]["model"])]
    return [
        "train",
        *small,
        "--data",
        str(path),
        "--reward.use",
        reward,
        *few,
        "--training.minibatches",
        "1",
        "--out",
        "out",
    ]


def _model(rng: random.Random, originals: Originals, folder: Path) -> list[str]:
    model = folder / "model"
    shutil.copytree(originals.model, model)
    what = rng.random()
    if what < 0.1:  # code that comes with a model
        for name, key in (
            ("config.json", "AutoModelForCausalLM"),
            ("config.json", "AutoConfig"),
            ("tokenizer_config.json", "AutoTokenizer"),
        ):
            tree = json.loads((model / name).read_text())
            tree.setdefault("auto_map", {})[key] = "evil.Evil" if key != "AutoTokenizer" else ["evil.Evil", None]
            tree["model_type"] = rng.choice((tree.get("model_type"), "evil"))
            (model / name).write_text(json.dumps(tree))
        (model / "evil.py").write_text("open('RAN', 'w')\nclass Evil: pass\n")
    elif what < 0.2:  # weights that run when unpickled
        (model / "model.safetensors").unlink()
        (model / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Canary()}))
    elif what < 0.25:
        (model / "chat_template.jinja").write_text(
            "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for i in range(10**9) %}x{% endfor %}"
        )
    else:
        mutate.damage_folder(rng, model)
    return rng.choice((
        ["doctor", "--policy.model", str(model)],
        ["eval", str(model), "--tasks", "chain:steps=1", "--n", "2", "--max-tokens", "4"],
        ["solve", str(model), "1+1?", "--max-tokens", "4"],
        ["train", "--model", str(model), "--critic.model", rng.choice((str(model), SMALL["critic"]["model"])), "--data", "chain:steps=1", "--out", "out",
         *(word for key, value in FEW.items() for word in (f"--{key}", str(value))), "--training.minibatches", "1"],
        ["critic", "score", str(model), "--data", "chain:steps=1", "--n", "2"],
    ))  # fmt: skip


def _run(rng: random.Random, originals: Originals, folder: Path) -> list[str]:
    run = folder / "run"
    shutil.copytree(originals.run, run)
    if rng.random() < 0.08:
        for path in run.rglob("*.pt"):
            path.write_bytes(pickle.dumps({"x": Canary()}))
    else:
        mutate.damage_folder(rng, run)
    path = str(run)
    return rng.choice((
        ["report", path, "--out", "report.html"],
        ["audit", "verify", path],
        ["audit", "replay", path],
        ["audit", "show", path, "1:0"],
        ["train", "--resume", path, "--steps", "3"],
        ["train", "--resume", path, "--steps", "3"],
        ["eval", path, "--tasks", "chain:steps=1", "--n", "2", "--max-tokens", "4"],
        ["solve", path, "1+1?", "--max-tokens", "4"],
        ["critic", "export", path, "--out", "critic"],
        ["doctor", str(run / "recipe.toml")],
        ["pages", path],
    ))  # fmt: skip


def pages(run: str) -> int:
    """Every page of `sppo view`, as a browser would ask for them."""
    from starlette.testclient import TestClient

    from sppo.report.live import application
    from sppo.report.reader import RunReader

    try:
        reader = RunReader(Path(run))
    except UserError as error:
        print(f"error: {error}")
        return 2
    with TestClient(application([reader]), base_url="http://127.0.0.1") as client:
        seen, todo = set(), ["/"]
        while todo and len(seen) < 30:
            path = todo.pop()
            seen.add(path)
            text = client.get(path).text
            todo += [p for p in re.findall(r'href="(/[^"#]*)"', text) if p not in seen and p not in todo]
    return 0


def child(arguments: list[str], folder: Path, said: Path) -> int:
    """In the forked process: run the command in its folder, with what it says in a file."""
    os.setsid()
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    out = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    try:
        return pages(arguments[1]) if arguments[0] == "pages" else main(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()


@dataclass
class Running:
    """A case under way."""

    kind: str
    number: int
    arguments: list[str]
    folder: Path
    began: float


class Fuzzer:
    """Runs cases side by side, each in a fork and a folder of its own."""

    def __init__(self, seed: int, room: Path, *, jobs: int, keep: bool = False) -> None:
        self.seed, self.room, self.jobs, self.keep = seed, room, jobs, keep
        preload()
        self.originals = Originals(room)
        self.running: dict[int, Running] = {}
        self.results: list[Result] = []

    def start(self, kind: str, number: int) -> None:
        """Fork one case."""
        folder = self.room / f"{kind}-{number}"
        folder.mkdir()
        arguments = lay_out(kind, random.Random(f"{self.seed}:{kind}:{number}"), self.originals, folder)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = child(arguments, folder, folder / "said")
            finally:
                os._exit(code)
        self.running[pid] = Running(kind, number, arguments, folder, time.monotonic())

    def wait(self) -> None:
        """Until one of the cases has ended, or has run out of time."""
        while True:
            for pid, case in self.running.items():
                over = time.monotonic() - case.began > LIMIT
                if over:
                    os.killpg(pid, signal.SIGKILL)
                done, status = os.waitpid(pid, 0 if over else os.WNOHANG)
                if done:
                    del self.running[pid]
                    self._finish(pid, case, status, over)
                    return
            time.sleep(0.01)

    def _finish(self, pid: int, case: Running, status: int, over: bool) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # workers that the command left
        said = (case.folder / "said").read_text(errors="replace") if (case.folder / "said").exists() else ""
        code = os.waitstatus_to_exitcode(status)
        if any(case.folder.rglob("RAN")):
            outcome = "executed"
        elif over:
            outcome = "hang"
        elif code < 0:
            outcome = "crashed"
        elif "Do you wish to run the custom code" in said:
            outcome = "asked"
        elif "Traceback (most recent call last)" in said:
            outcome = "traceback"
        else:
            outcome = "sentence" if code else "ok"
        seconds = time.monotonic() - case.began
        self.results.append(Result(case.kind, case.number, outcome, tuple(case.arguments), said, seconds))
        if not (self.keep or self.results[-1].bad):
            shutil.rmtree(case.folder, ignore_errors=True)

    def run(self, cases: list[tuple[str, int]], *, verbose: bool = False) -> list[Result]:
        """All of them, in order; the results in the order in which they ended."""
        began, told = time.monotonic(), 0
        for i, (kind, number) in enumerate(cases):
            if len(self.running) >= self.jobs:
                self.wait()
            self.start(kind, number)
            if verbose:
                told = self._tell(told)
            if verbose and i % 100 == 99:
                rate = (time.monotonic() - began) / (i + 1)
                left = rate * (len(cases) - i) / 60
                print(f"{i + 1} of {len(cases)} cases, {left:.1f} minutes left", file=sys.stderr, flush=True)
        while self.running:
            self.wait()
        if verbose:
            self._tell(told)
        return self.results

    def _tell(self, told: int) -> int:
        for r in self.results[told:]:
            if r.bad:
                print(f"{r.outcome:10} {r.kind}:{r.number:<5} {r.arguments[0]:8} {last_line(r.text)}", flush=True)
        return len(self.results)


def last_line(text: str) -> str:
    """Where a traceback ends: the exception, and the line of this package that raised it."""
    ours = re.findall(r'File "[^"]*/(sppo/[^"]+)", line (\d+)', text)
    last = text.strip().splitlines()[-1][:200] if text.strip() else ""
    return f"{':'.join(ours[-1]) if ours else '-'}  {last}"


def cli() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--share", type=float, default=1.0, help="run this share of the cases [1]")
    parser.add_argument("--kinds", default=",".join(KINDS), help="[all]")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="one case, its folder kept")
    args = parser.parse_args()
    room = Path(tempfile.mkdtemp(prefix="sppo-fuzz-"))
    fuzzer = Fuzzer(args.seed, room, jobs=args.jobs, keep=bool(args.only))
    if args.only:
        kind, _, number = args.only.partition(":")
        result = fuzzer.run([(kind, int(number))])[0]
        print(result.text, f"{result.outcome} in {result.seconds:.1f} s: sppo {' '.join(result.arguments)}", sep="\n")
        return int(result.bad)
    cases = [(kind, n) for kind in args.kinds.split(",") for n in range(int(KINDS[kind] * args.share))]
    began = time.monotonic()
    results = fuzzer.run(cases, verbose=True)
    bad = [r for r in results if r.bad]
    counts = {kind: dict(Counter(r.outcome for r in results if r.kind == kind)) for kind in args.kinds.split(",")}
    if not bad:
        shutil.rmtree(room)
    print(
        json.dumps(
            {"cases": len(results), "bad": len(bad), "seconds": round(time.monotonic() - began, 1), "outcomes": counts}
        )
    )
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(cli())
