"""Verifier workers give the verdicts of one process: in order, divided or not, and when one of them is killed or stopped."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

pytest.importorskip("ray")

from sppo.cluster.fleet import Fleet
from sppo.cluster.verifiers import Verifiers, chunk_size, verifiers
from sppo.errors import RecipeError, RewardError, SandboxUnavailable, UserError
from sppo.recipe.config import Config
from sppo.recipe.sections import ClusterSection
from sppo.rewards.base import Reward
from sppo.rewards.combine import MixedReward
from sppo.rewards.loading import load_reward
from sppo.tasks.loading import load_tasks
from sppo.types import Rollout, Task, Verdict

OWN = '''
import os, time
from pathlib import Path
from sppo.errors import SandboxUnavailable
from sppo.types import Verdict


def slow(completions, answer, **columns):
    time.sleep(0.1 * len(completions))
    return [float(c == a) for c, a in zip(completions, answer)]
slow.divisible = True


def longest(completions, **columns):
    """The share of the longest response of the call: no call may be divided."""
    most = max(map(len, completions))
    return [len(c) / most for c in completions]


def picky(completions, answer, **columns):
    if "broken" in completions:
        raise ValueError("cannot read 'broken'")
    return [float(c == a) for c, a in zip(completions, answer)]
picky.divisible = True


def stuck(completions, **columns):
    time.sleep(1000)


class Once:
    """Can judge in the process that comes first, as if only its node had a jail."""

    divisible = True

    def __init__(self, most=1):
        self.most = most

    def check(self, task):
        for n in range(self.most):
            try:
                (Path(task.columns["place"]) / str(n)).touch(exist_ok=False)
                return None
            except FileExistsError:
                continue
        raise SandboxUnavailable("no jail on this node")

    def judge(self, rollouts):
        return [Verdict(1.0, "correct", {"by": os.getpid()}) for _ in rollouts]
'''


@pytest.fixture(scope="module")
def notes() -> list[str]:
    return []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("own")
    (place / "mine.py").write_text(OWN)
    return place


@pytest.fixture(scope="module")
def fleet(notes: list[str], folder: Path) -> Iterator[Fleet]:
    """Started elsewhere than in the folder of the rewards: the workers must go there."""
    made = Fleet(ClusterSection(timeout=4, start_timeout=60, backoff=0, restarts=20), notes.append)
    yield made
    made.close()


@pytest.fixture
def started(fleet: Fleet, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Verifiers]]:
    monkeypatch.chdir(folder)
    made: list[Verifiers] = []

    def start(use: str | Reward, task: Task, workers: int = 2, limit: float = 600.0) -> Verifiers:
        inner = load_reward(use, limit) if isinstance(use, str) else use
        made.append(verifiers(fleet, workers, use, limit, task, inner))
        made[-1].ready()
        return made[-1]

    yield start
    for one in made:
        one.close()
    assert not processes()


def processes() -> list[psutil.Process]:
    """Of verifier workers that this process's cluster runs."""
    deadline, found = time.monotonic() + 10, list[psutil.Process]()
    while time.monotonic() < deadline:
        found = [p for p in psutil.Process().children(recursive=True) if is_verifier(p)]
        if not found:
            break
        time.sleep(0.1)
    return found


def is_verifier(process: psutil.Process) -> bool:
    try:
        return "ray::VerifierWorker" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def now() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if is_verifier(p)]


def rollouts(n: int = 23, wrong: int = 3) -> list[Rollout]:
    """Responses to small sums; every `wrong`-th one is wrong, and each has a length of its own."""
    tasks = [Task(f"sum/{i}", f"{i} + 1?", {"answer": str(i + 1)}) for i in range(n)]
    texts = [f"{' ' * i}A: {i + 1 if i % wrong else i}" for i in range(n)]
    return [
        Rollout.answer(t, [1], [2] * (i + 1), [-0.5] * (i + 1), "stop", text)
        for i, (t, text) in enumerate(zip(tasks, texts, strict=True))
    ]


def bare(n: int = 23, wrong: int = 3) -> list[Rollout]:
    """The same, for rewards that compare the whole response."""
    return [r.answered([2], r.text.split()[-1]) for r in rollouts(n, wrong)]


@pytest.mark.parametrize("use", ["answer", "math", "answer + 0.5 * length:free=4,limit=30"])
def test_verdicts_are_those_of_one_process_in_order(started: Callable[..., Verifiers], use: str) -> None:
    given = rollouts()
    judging, inline = started(use, given[0].task), load_reward(use)
    found = judging.judge(given)
    assert found == inline.judge(given)
    assert [v.correct for v in found] == [float(i % 3 > 0) for i in range(len(given))]
    assert judging.metrics() == {"cluster/verifiers": 2}


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="programs need bubblewrap")
def test_programs_are_judged_in_jails_of_the_workers(started: Callable[..., Verifiers]) -> None:
    task = Task("double", "Write f.", {"tests": ["assert f(2) == 4", "assert f(3) == 6"]})
    programs = ["def f(x): return 2 * x", "def f(x): return 4", "no program"] * 2
    given = [
        Rollout.answer(task, [1], [2], [0.0], "stop", p if p == "no program" else f"```python\n{p}\n```")
        for p in programs
    ]
    judging, inline = started("code", task), load_reward("code")
    found = judging.judge(given)
    inline.close()
    assert [v.outcome for v in found] == ["correct", "wrong", "unparseable"] * 2
    assert [v.score for v in found] == [v.score for v in inline.judge(given)]
    inline.close()


def test_what_fades_fades_on_the_workers(started: Callable[..., Verifiers]) -> None:
    use, given = "answer + length:free=4,limit=30", rollouts()
    judging, inline = started(use, given[0].task), load_reward(use)
    assert isinstance(inline, MixedReward)
    whole = judging.judge(given)
    judging.fade = inline.fade = 0.25
    faded = judging.judge(given)
    assert faded == inline.judge(given)
    assert faded != whole


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_verifier_that_is_killed_or_stopped_is_replaced(
    started: Callable[..., Verifiers], notes: list[str], fleet: Fleet, sent: signal.Signals
) -> None:
    given = bare(40)
    judging, before = started("mine:slow", given[0].task), fleet.lost
    victim = now()[0]
    threading.Timer(0.5, lambda: victim.send_signal(sent)).start()
    found = judging.judge(given)
    assert [v.score for v in found] == [float(i % 3 > 0) for i in range(len(given))]
    assert fleet.lost == before + 1
    assert "verifier" in notes[-1]
    assert ("died" if sent == signal.SIGKILL else "no sign of life for 4 seconds") in notes[-1]


def test_a_verifier_that_is_stopped_while_it_starts_is_replaced(
    started: Callable[..., Verifiers], fleet: Fleet, folder: Path
) -> None:
    """It has shown a sign of life: cluster.timeout counts, and not cluster.start_timeout."""
    (folder / "heavy.py").write_text(
        "import time\ntime.sleep(8)\n\n\ndef f(completions, **columns):\n    return [1.0] * len(completions)\n"
    )
    before, stopped, over = fleet.lost, list[int](), threading.Event()

    def stop() -> None:
        while not stopped and not over.wait(0.1):
            for process in [p for p in now() if ".open" in " ".join(p.cmdline())][:1]:
                time.sleep(4)  # it has answered by then
                process.suspend()
                stopped.append(process.pid)

    threading.Thread(target=stop, daemon=True).start()
    try:
        judging = started("heavy:f", rollouts(1)[0].task)
    finally:
        over.set()
    assert stopped
    assert fleet.lost == before + 1
    assert judging.metrics() == {"cluster/verifiers": 2}


def test_a_reward_that_compares_responses_gets_a_call_whole(
    started: Callable[..., Verifiers], notes: list[str]
) -> None:
    given = rollouts()
    judging = started("mine:longest", given[0].task)
    assert [v.score for v in judging.judge(given)] == pytest.approx([len(r.text) / len(given[-1].text) for r in given])
    assert "divisible = True" in notes[-1]


def test_faults_are_counted_over_the_whole_call(started: Callable[..., Verifiers]) -> None:
    """One response of 23 at fault is masked, though it is a third of its chunk; three break the reward, with the same sentence."""
    few = bare()
    few[5] = few[5].answered([2], "broken")
    judging, inline = started("mine:picky", few[0].task), load_reward("mine:picky")
    found = judging.judge(few)
    assert found == inline.judge(few)
    assert [i for i, v in enumerate(found) if v.masked] == [5]
    many = [r.answered([2], "broken") if i in (5, 9, 20) else r for i, r in enumerate(few)]
    with pytest.raises(RewardError) as here:
        inline.judge(many)
    with pytest.raises(RewardError) as there:
        judging.judge(many)
    assert str(there.value) == str(here.value)
    assert "cannot read 'broken'" in str(there.value)


def test_a_reward_that_cannot_be_interrupted_is_given_up(started: Callable[..., Verifiers]) -> None:
    """Where a thread waits outside of Python, the limit of a call does not end it: the worker does."""
    given = rollouts(2)
    judging = started("mine:stuck", given[0].task, 1, limit=1)
    with pytest.raises(RewardError, match=r"did not come back on verifier 1, long after its limit \(reward\.limit\)"):
        judging.judge(given)


def test_a_worker_whose_node_cannot_judge_is_named_and_not_used(
    started: Callable[..., Verifiers], notes: list[str], tmp_path: Path
) -> None:
    task = Task("t", "?", {"place": str(tmp_path)})
    judging = started("mine:Once", task)
    assert judging.metrics() == {"cluster/verifiers": 1}
    assert any("is not used" in note and "no jail on this node" in note for note in notes)
    given = [Rollout.answer(task, [1], [2], [0.0], "stop", "x") for _ in range(9)]
    assert len({v.evidence["by"] for v in judging.judge(given)}) == 1
    with pytest.raises(SandboxUnavailable, match="no jail on this node"):
        started("mine:Once,most=0", task)


class Given:
    """A reward made in Python."""

    divisible = True

    def __init__(self, held: object) -> None:
        self.held = held

    def judge(self, rollouts: list[Rollout]) -> list[Verdict]:
        return [Verdict(1.0 if r.text.endswith(r.task.columns["answer"]) else 0.0, "correct") for r in rollouts]

    def check(self, task: Task) -> str | None:
        return None

    def close(self) -> None:
        return None


def test_a_reward_given_in_python_is_sent_where_it_can_be(started: Callable[..., Verifiers]) -> None:
    given = rollouts()
    judging = started(load_reward(Given(os.getpid())), given[0].task)
    assert judging.judge(given) == load_reward(Given(0)).judge(given)
    with pytest.raises(RecipeError, match=r"cannot be sent to other processes .* set reward\.workers = 0"):
        started(load_reward(Given(threading.Lock())), given[0].task)


def test_a_file_that_a_node_lacks_is_the_users_sentence(
    fleet: Fleet, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "fleeting.py").write_text("def f(completions, **columns): return [1.0] * len(completions)\n")
    inner = load_reward("fleeting:f")
    (folder / "fleeting.py").unlink()
    judging = verifiers(fleet, 1, "fleeting:f", 600, Task("t", "?"), inner)
    with pytest.raises(UserError, match=r"there is no fleeting\.py"):
        judging.ready()
    assert not processes()


def test_chunks_depend_on_the_call_and_the_number_of_workers_alone() -> None:
    assert [chunk_size(n, 2) for n in (1, 8, 9, 256)] == [1, 1, 2, 32]


def test_workers_without_a_cluster_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"reward\.workers = 2 are processes of a cluster"):
        Config.validated({"reward": {"workers": 2}}, "--reward.workers")


def test_tasks_of_the_package_are_judged_alike(started: Callable[..., Verifiers]) -> None:
    tasks = load_tasks("chain:steps=4-6")
    given = [Rollout.answer(tasks[i], [1], [2], [0.0], "stop", tasks[i].solution or "") for i in range(10)]
    judging = started("answer + 0 * steps:check=chain,split=semicolons", tasks[0], 1)
    assert judging.judge(given) == load_reward("answer + 0 * steps:check=chain,split=semicolons").judge(given)
