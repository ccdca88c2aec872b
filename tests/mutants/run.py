"""`make mutants`: does a test fail for each fault that is made on purpose? mutants.py keeps the list.

Each mutant is written into a temporary copy of src/, one at a time, and the fast tests run against it until the first one fails, those that the
mutant names first. The unchanged copy comes first, and must pass. The last line is JSON, {"killed": …, "total": …}; survivors are listed above
it, and below 95% the exit code is 1. `--only "dual clip"` runs the mutants whose names or files hold that text.

mutmut and cosmic-ray were considered. They make every mutant that a grammar allows, several thousand in these modules, most of them of messages
and metrics; each would cost a test run in a fresh process, five seconds for importing torch alone. And the faults that matter here are of meaning,
several tokens wide: `old` taken anew each epoch, a KL that is a mean of means, a cut forgotten in one of two places. So the list is kept by hand,
and a process forks after it has imported everything but the package itself: a mutant costs what its tests do.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import gc
import importlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
}

from tests.mutants.mutants import FAST, MUTANTS, SLOW, Mutant

ROOT = Path(__file__).parents[2]
LIMIT = 300.0
"""Seconds that the tests of one mutant may take; one that makes them hang is found, too."""
ENOUGH = 0.95
HEAVY = (
    "torch", "torch._dynamo", "torch.utils.checkpoint", "transformers", "transformers.models.llama.modeling_llama",
    "transformers.models.bert.modeling_bert", "transformers.integrations.sdpa_attention", "tokenizers", "safetensors.torch", "datasets",
    "pyarrow", "pydantic", "pydantic.fields", "pydantic.main", "pydantic.functional_validators", "pydantic.plugin._loader", "platformdirs",
    "tomllib", "tomli_w", "_pytest.main", "_pytest.python", "_pytest.terminal", "pytest", "jinja2", "rich.console", "plotly", "mpmath", "re2", "psutil",
)  # fmt: skip
"""What the package and its tests import."""
PASSED, FAILED, HUNG = 0, 1, -1


class Spent:
    """Processor time of all tests so far, which does not depend on what else the machine does."""

    seconds = 0.0


@contextlib.contextmanager
def applied(mutant: Mutant, source: Path) -> Iterator[None]:
    """The mutant in the copy of src/, until the end. No stale bytecode: the file's time is another one meanwhile."""
    path = source / "sppo" / mutant.file
    before, stat = path.read_text(), path.stat()
    if before.count(mutant.old) != 1:
        raise SystemExit(
            f"{mutant.name}: its text is found {before.count(mutant.old)} times in {mutant.file}, not once"
        )
    path.write_text(before.replace(mutant.old, mutant.new))
    os.utime(path, (stat.st_atime, stat.st_mtime + 3600))
    try:
        yield
    finally:
        path.write_text(before)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def tested(source: Path, tests: Sequence[str], log: Path, *, mutated: bool) -> int:
    """pytest's exit code for these files against the package in `source`, in a forked process; or HUNG."""
    gc.freeze()  # what is there need not be looked through again
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fork of a process with threads; they are idle
        child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        _child(source, tests, log, mutated)
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            Spent.seconds += used.ru_utime + used.ru_stime
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return HUNG


def _child(source: Path, tests: Sequence[str], log: Path, mutated: bool) -> None:
    """Run and leave, without what the parent would do at its end."""
    code = 99
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ |= {"PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1" if mutated else ""}
        sys.dont_write_bytecode = mutated
        sys.path.insert(0, str(source))
        import pytest

        import sppo

        assert Path(sppo.__file__).is_relative_to(source), f"{sppo.__file__} is not the copy"
        options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
        options += ["-k", f"not ({SLOW})"]
        code = int(pytest.main([*options, "--rootdir", str(ROOT), *tests]))
        sys.stdout.flush()
    except BaseException as error:
        traceback.print_exception(error)
        sys.stderr.flush()
    finally:
        os._exit(code)


def killer(log: Path) -> str:
    """The test that failed."""
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", log.read_text(errors="replace"), re.M)
    return found.group(1) if found else "?"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", action="append", default=[], help="mutants whose names or files hold this text")
    parser.add_argument("--named", action="store_true", help="only the tests that a mutant names, not all fast ones")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if not options.only or any(t in m.name or t in m.file for t in options.only)]
    os.chdir(ROOT)
    for name in HEAVY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert not any(name.partition(".")[0] == "sppo" for name in sys.modules)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        source, log = Path(folder) / "src", Path(folder) / "log"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        compileall.compile_dir(source, quiet=1)
        if not options.only and (code := tested(source, FAST, log, mutated=False)) != PASSED:
            print(f"the tests fail without any mutant ({code}):\n{log.read_text(errors='replace')[-3000:]}")
            return 2
        print(
            f"{len(chosen)} mutants; without one the tests pass in {Spent.seconds:.0f} s of processor time", flush=True
        )
        survivors = []
        for mutant in chosen:
            before = Spent.seconds
            with applied(mutant, source):
                code = tested(source, mutant.tests, log, mutated=True)
                if code == PASSED and not options.named:
                    code = tested(source, FAST, log, mutated=True)
            seconds = Spent.seconds - before
            if code not in (PASSED, FAILED, HUNG):
                print(f"{mutant.name}: pytest ends with {code}\n{log.read_text(errors='replace')[-3000:]}")
                return 2
            by = "SURVIVES" if code == PASSED else "killed" if code == FAILED else "killed (hangs)"
            print(
                f"{by:9} {seconds:5.1f} s  {mutant.file}: {mutant.name}  {killer(log) if code == FAILED else ''}",
                flush=True,
            )
            if code == PASSED:
                survivors.append(mutant)
    for mutant in survivors:
        print(f"survivor: {mutant.file}: {mutant.name}: {mutant.equivalent or 'a test is missing'}")
    killed = len(chosen) - len(survivors)
    print(f"{Spent.seconds:.0f} s of processor time, {time.monotonic() - began:.0f} s in all")
    print(json.dumps({"killed": killed, "total": len(chosen)}))
    return 0 if killed >= ENOUGH * len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
