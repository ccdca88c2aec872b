"""reasoning-gym's scorers behind a jail: what was right stays right, nothing an answer does runs here or outlives its verdict."""

from __future__ import annotations

import base64
import copy
import json
import pickle
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

reasoning_gym = pytest.importorskip("reasoning_gym")

from reasoning_gym.factory import DATASETS  # noqa: E402

from sppo.cli.main import main  # noqa: E402
from sppo.errors import RecipeError, SandboxUnavailable  # noqa: E402
from sppo.rewards import gym as reward_module  # noqa: E402
from sppo.rewards.gym import GymReward  # noqa: E402
from sppo.rewards.inside import guards  # noqa: E402
from sppo.rewards.loading import load_reward  # noqa: E402
from sppo.sandbox import confined  # noqa: E402
from sppo.tasks.loading import load_tasks  # noqa: E402
from sppo.types import Rollout, Task, Verdict  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own: files left open, empty matrices
FAMILIES = sorted(set(DATASETS) - {"composite"})  # that one has no problems of its own
SEED, SIZE = 11, 1000
EVALUATED = (
    "countdown", "puzzle24", "simple_integration", "intermediate_integration", "polynomial_multiplication", "n_queens",
    "binary_matrix", "spiral_matrix", "string_insertion",
)  # fmt: skip
TRIVIAL = (
    " ", "0", "1", "-1", "0.0", "nan", "NaN", "inf", "1e309", "nan+nani", "nan,nan", "[]", "{}", "[[]]", "()", "None", "no idea",
    "x", "A", "(A → A)", "x → x", "0" * 5000, "8*3*1*1", "O(1)", "zoo", "C", "1/1", "'", '"a"', "null", "a,b", "0 0", "True False",
)  # fmt: skip


def fresh(backend: str = "") -> Iterator[GymReward]:
    with pytest.MonkeyPatch.context() as patch:
        if backend:
            patch.setattr(confined, "confinement", lambda: backend)
            patch.setattr(reward_module, "confinement", lambda: backend)
        made = load_reward("gym")
        assert isinstance(made, GymReward)
        yield made
        made.close()


@pytest.fixture(scope="module")
def reward() -> Iterator[GymReward]:
    yield from fresh()


@pytest.fixture(params=["bwrap", "landlock"])
def jailed(request: pytest.FixtureRequest) -> Iterator[GymReward]:
    """The reward in each jail that this machine has."""
    confined.confinement.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "landlock":
            patch.setattr(confined.shutil, "which", lambda _: None)
        found = confined.confinement()
    confined.confinement.cache_clear()
    if found != request.param:
        pytest.skip(f"no {request.param} here")
    yield from fresh(request.param)


def rollout(family: str, index: int, text: str, entry: Any = None) -> Rollout:
    entry = entry or reasoning_gym.create_dataset(family, seed=SEED, size=SIZE)[index]
    where = {"family": family, "seed": SEED, "size": SIZE, "options": {}, "index": index}
    return Rollout.answer(
        Task("t", entry["question"], {"answer": entry["answer"], "gym": where}), [], [], [], "stop", text
    )


def judged(reward: GymReward, family: str, *answers: str) -> list[Verdict]:
    return reward.judge([rollout(family, 0, f"Answer: {answer}") for answer in answers])


def right_answer(entry: dict[str, Any]) -> str | None:
    """The row's own answer, or the example that families with many right ones keep."""
    kept = entry["metadata"]
    if entry["answer"] is not None:
        return str(entry["answer"])
    if "possible_answer" in kept:
        return json.dumps({str(k): v for k, v in kept["possible_answer"].items()})
    return kept.get("example_correct_answer") or kept.get("example_answer")


def as_numbers(code: str) -> str:
    """A text for SymPy's `S` in which every character that a filter might look for is written as a number."""
    numbers = [ord(c) for c in code if not c.isalnum() and c not in " ,"]
    pattern = "".join(c if c.isalnum() or c in " ," else "%c" for c in code)
    return f"S('{pattern}' % ({','.join(map(str, numbers))}))"


@pytest.mark.parametrize("letter", sorted({f[0] for f in FAMILIES}))
def test_a_right_answer_scores_as_in_reasoning_gym_itself(reward: GymReward, letter: str) -> None:
    rollouts, wanted = [], []
    for family in (f for f in FAMILIES if f[0] == letter):
        dataset = reasoning_gym.create_dataset(family, seed=SEED, size=SIZE)
        for index in range(5):
            entry = dataset[index]
            if (answer := right_answer(entry)) is not None:
                rollouts.append(rollout(family, index, f"Answer: {answer}", entry))
                wanted.append((family, dataset.score_answer(answer=answer, entry=entry)))
    verdicts = reward.judge(rollouts)
    assert [(family, v.score) for (family, _), v in zip(wanted, verdicts, strict=True)] == wanted


@pytest.mark.parametrize("letter", sorted({f[0] for f in FAMILIES}))
def test_no_trivial_answer_is_paid_in_full(letter: str) -> None:
    for family in (f for f in FAMILIES if f[0] == letter):
        dataset = reasoning_gym.create_dataset(family, seed=7, size=SIZE)
        for index in range(4):
            entry = dataset[index]
            for answer in (*TRIVIAL, entry["question"]):
                try:
                    score = guards.score(family, dataset, copy.deepcopy(entry), answer)
                except Exception:
                    continue  # refused, or no form that the scorer knows
                if score >= 1:  # only where it is right
                    assert same_number(answer, entry["answer"]), (family, answer, entry["answer"])


def same_number(a: str, b: str) -> bool:
    try:
        return float(a) == float(b)
    except ValueError:
        return a.strip("'\"") == b.strip("'\"")


@pytest.mark.parametrize(
    ("family", "nonsense"),
    [
        ("complex_arithmetic", ["nan", "NaN", "nan+nani"]),
        ("game_of_life_halting", ["0", "anything", "true or false"]),
        ("coin_flip", ["0", "0.0", "0/1", "0."]),
        ("puzzle24", ["8*3*1*1", "24", "4!", "6*4", "23 + 1"]),
        ("countdown", ["0", "no idea", "1e2+79", "0x4F + 100"]),
        ("prime_factorization", ["1"]),
        ("number_sorting", ["[]", "['0']"]),
        ("tsumego", ["?", "nothing"]),
        ("color_cube_rotation", ["no idea"]),
        ("graph_color", ["{}", "[]"]),
        ("palindrome_generation", ["aa", "a"]),
    ],
)
def test_scorers_that_pay_nonsense_are_not_taken_at_their_word(
    reward: GymReward, family: str, nonsense: list[str]
) -> None:
    assert [(v.score, v.masked) for v in judged(reward, family, *nonsense)] == [(0.0, False)] * len(nonsense)


def test_an_expression_uses_the_rows_numbers_once_each_and_is_exact() -> None:
    entry = {"question": "?", "answer": "", "metadata": {"numbers": [8, 3, 1, 1]}}

    def pays(answer: str) -> bool:
        try:
            return guards.score("puzzle24", None, entry, answer) == 1
        except guards.Refused:
            return False

    assert all(pays(a) for a in ("8*3*1*1", "8 * 3 / 1 * 1", "(8*3) + 1 - 1", "-(-8*3)*1/1"))
    assert not any(
        pays(a) for a in ("8*3", "8*3*1", "8*3*1*1*1", "6*4*1*1", "8*3**1*1", "24", "8*3+1//1-1", "8*3*1*1.0", "")
    )
    half = {"question": "?", "answer": "", "metadata": {"numbers": [49, 2, 1, 1]}}
    assert guards.score("puzzle24", None, half, "49/2*1*1") == 0  # 24.5, which `int` makes 24


def test_partial_credit_is_for_what_the_answer_says() -> None:
    dataset = reasoning_gym.create_dataset("prime_factorization", seed=SEED, size=SIZE)
    entry = next(dataset[i] for i in range(100) if dataset[i]["answer"].count("×") > 1)
    first = entry["answer"].split(" × ")[0]
    product = entry["metadata"]["number"]
    partly = f"{first} × {product // int(first)}"
    scores = [
        guards.score("prime_factorization", dataset, copy.deepcopy(entry), a)
        for a in (str(product), f"1 × {product}", partly)
    ]
    assert scores == [0, 0, 0.5]
    found = {a: guards.embedded(a, "12", 2 / len(a)) for a in ("x = 12", "12.", "112", "-12", "x12", "12/5", "120, 12")}
    assert found == {
        "x = 12": False,
        "12.": False,
        "112": True,
        "-12": True,
        "x12": True,
        "12/5": True,
        "120, 12": False,
    }
    assert guards.hedged("true or False", "True")
    assert not guards.hedged("It is true", "True")


def test_a_score_outside_its_range_is_none() -> None:
    assert [guards.in_range(x) for x in (0.5, 1.0, 1 + 1e-12, 148.4, -0.1, float("nan"), float("inf"))] == [
        0.5,
        1,
        1,
        0,
        0,
        0,
        0,
    ]


def test_a_problem_that_everybody_is_paid_for_is_no_problem() -> None:
    class PaysAll:
        def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
            return 1.0

    with pytest.raises(guards.Ungradable, match="made_up"):
        guards.score("made_up", PaysAll(), {"question": "What?", "answer": "3", "metadata": {}}, "3")


@pytest.mark.parametrize(
    "answer",
    [
        "x**3/3 + C", "-5*X**9 - 2*X**6/3 + 4*X**3 + C", "exp(x)*sin(x) + C", "x*asin(3*x) + sqrt(1 - 9*x**2)/3", "log(Abs(x)) + pi",
        "2*(4*x + 2)**(3/2)/3", "1.5e-3*x", "x_1 + C1", "5!", "",
    ],
)  # fmt: skip
def test_expressions_that_sympy_may_see(answer: str) -> None:
    guards.expression(answer, "gold")


@pytest.mark.parametrize(
    "answer",
    [
        as_numbers("__import__('os')"), "'x'", '"x"', "Integral(x**2, x)", "integrate(x**2, x)", "x.diff", "lambda: 0", "[1]", "{1}", "S(2)",
        "__import__", "eval(x)", "x if x else 1", "x = 1", "x; 1", "x\\\n", "f`x`", "x#", "ｅval(x)", "Lambda(x, x)", "N(1)", "x: 1", "a%b",
        "sympify(x)", "x" * 20_000, "1" + "+1" * 20_000,
    ],
)  # fmt: skip
def test_expressions_that_sympy_never_sees(answer: str) -> None:
    with pytest.raises(guards.Refused):
        guards.expression(answer, "gold")
    guards.expression(answer, answer)  # the row's own text


def test_an_unevaluated_integral_is_paid_only_where_it_is_the_reference(reward: GymReward) -> None:
    dataset = reasoning_gym.create_dataset("intermediate_integration", seed=SEED, size=SIZE)
    index = next(i for i in range(100) if "Integral" in dataset[i]["answer"])
    gold, other = dataset[index]["answer"], dataset[index + 1]
    texts = [
        rollout("intermediate_integration", index, f"Answer: {gold}"),
        rollout("intermediate_integration", index + 1, f"Answer: Integral({other['metadata']['integrand']}, x)"),
    ]
    assert [(v.outcome, v.score) for v in reward.judge(texts)] == [("correct", 1.0), ("unparseable", 0.0)]


@pytest.mark.parametrize("family", EVALUATED)
def test_no_answer_is_executed(reward: GymReward, family: str, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    code = f"__import__('os').system('touch {mark}')"
    hidden = as_numbers(code)
    answers = [
        code,
        hidden,
        hidden.replace("S(", "sin(", 1),
        f'"{code}"',
        f"[{code}]",
        f"[[{hidden}]]",
        f"({hidden},)",
        f"f'{{{code}}}'",
    ]
    verdicts = judged(reward, family, *answers)
    assert not mark.exists()
    assert {(v.score, v.masked) for v in verdicts} == {(0.0, False)}


def test_one_verdict_changes_no_other(reward: GymReward) -> None:
    forge = "exec('import reasoning_gym.games.countdown as m; m.CountdownDataset.score_answer = lambda s, answer, entry: 1.0')"
    judged(reward, "countdown", forge, as_numbers(forge))
    assert [v.score for v in judged(reward, "countdown", "0", "no idea")] == [0, 0]


def let_through(reward: GymReward, code: str) -> Verdict:
    """The verdict where code does reach SymPy's evaluation, as the reference of its row: what the jail holds back, not the grammar."""
    source = f"exec({code!r}, {{}})"
    entry = reasoning_gym.create_dataset("simple_integration", seed=SEED, size=SIZE)[0] | {"answer": source}
    where = {"family": "simple_integration", "seed": SEED, "size": SIZE, "options": {}, "index": 0}
    job = where | {
        "answer": source,
        "limit": 5.0,
        "patience": 60.0,
        "entry": base64.b64encode(pickle.dumps(entry)).decode(),
    }
    return reward._verdict(reward.pool.run([job])[0], {})


TRY = """
import os
def tried(what):
    try:
        return repr(what())[:40]
    except BaseException as error:
        return type(error).__name__
"""
END = "\nimport json\nos.write(3, json.dumps({'unread': said}).encode())\nos._exit(0)"


def test_what_is_evaluated_all_the_same_is_in_a_jail(jailed: GymReward, tmp_path: Path) -> None:
    secret, mark = tmp_path / "secret", tmp_path / "mark"
    secret.write_text("key")
    attempts = {
        "read": f"open({str(secret)!r}).read()", "passwd": "open('/etc/passwd').read()", "home": "os.listdir(os.path.expanduser('~root'))",
        "write": f"open({str(mark)!r}, 'w')", "tmp": "open('/tmp/x', 'w')", "fork": "os.fork()", "exec": "os.execv('/bin/sh', ['sh'])",
        "network": "__import__('socket').socket().connect(('127.0.0.1', 1))", "parent": "os.kill(1, 9) or os.kill(os.getppid(), 0)",
        "memory": "len(bytes(8 << 30))", "other": "open('/proc/%d/mem' % os.getppid(), 'rb')",
    }  # fmt: skip
    if jailed.pool.command()[0][0].endswith("bwrap"):
        del attempts["parent"]  # the zygote itself, which is in the same jail and is started anew
    code = (
        TRY + "said = ' '.join([" + ", ".join(f"tried(lambda: {attempt})" for attempt in attempts.values()) + "])" + END
    )
    verdict = let_through(jailed, code)
    assert verdict.outcome == "unparseable"
    said = dict(zip(attempts, verdict.evidence["reason"].split(), strict=True))
    refused = {
        "PermissionError",
        "FileNotFoundError",
        "OSError",
        "BlockingIOError",
        "MemoryError",
        "ProcessLookupError",
    }
    assert {name: word for name, word in said.items() if word not in refused} == {}
    assert not mark.exists()


@pytest.mark.parametrize(
    "line",
    [b"", b"{}", b"[", b"7", b"x" * 100_000, b'{"score": true}', b'{"score": 2}', b'{"score": NaN}', b'{"score": "1"}'],
)
def test_the_jails_word_is_a_claim(reward: GymReward, line: bytes) -> None:
    verdict = let_through(reward, f"import os; os.write(3, {line!r}); os._exit(0)")
    assert (verdict.outcome, verdict.score) == ("crashed", 0.0)
    assert [v.score for v in judged(reward, "chain_sum", "no idea")] == [0]


def test_time_and_memory_end_a_verdict_and_nothing_else() -> None:
    quick = load_reward("gym:limit=2")
    right = str(reasoning_gym.create_dataset("simple_integration", seed=SEED, size=SIZE)[0]["answer"])
    assert isinstance(quick, GymReward)
    verdicts = judged(quick, "simple_integration", "factorial(10**8)", "9**9**9**9", right)
    assert let_through(quick, "import time; time.sleep(1000)").outcome == "timeout"
    quick.close()
    assert [(v.outcome, v.score) for v in verdicts] == [("timeout", 0.0), ("timeout", 0.0), ("correct", 1.0)]


def test_without_a_jail_only_families_that_evaluate_nothing_are_judged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_landlock() -> None:
        raise OSError("landlock: no such system call")

    confined.confinement.cache_clear()
    monkeypatch.setattr(confined.shutil, "which", lambda _: None)
    monkeypatch.setattr(confined.landlock, "require", no_landlock)
    assert confined.confinement() == "none"
    bare = load_reward("gym")
    for family in sorted(guards.EXPRESSIONS):
        with pytest.raises(SandboxUnavailable, match=f"gym:{family}.*jail"):
            bare.check(rollout(family, 0, "").task)
    assert main(["data", "check", "gym:simple_integration", "--reward", "gym", "--n", "3"]) == 2
    assert "gym:simple_integration" in capsys.readouterr().err
    task = load_tasks("gym:chain_sum")[0]
    texts = [f"Answer: {task.columns['answer']}", "Answer: 1", f"Answer: {as_numbers('exit()')}"]
    assert [v.score for v in bare.judge([Rollout.answer(task, [], [], [], "stop", text) for text in texts])] == [
        1,
        0,
        0,
    ]
    bare.close()
    confined.confinement.cache_clear()


def test_a_scorer_that_turns_out_to_evaluate_is_named_and_masked(reward: GymReward) -> None:
    """Of a family that is taken not to: a look at the problem evaluates a text here, and is stopped before it does."""
    metadata = defaultdict(partial(eval, "__import__('os').write(3, b'evaluated')"))
    entry = {"question": "?", "answer": "1", "metadata": metadata}
    where = rollout("number_format", 0, "").task.columns["gym"]
    job = where | {
        "answer": "1",
        "limit": 5.0,
        "patience": 60.0,
        "entry": base64.b64encode(pickle.dumps(entry)).decode(),
    }
    verdict = reward._verdict(reward.pool.run([job])[0], {})
    assert verdict.outcome == "invalid_task"
    assert "number_format runs answers as code" in verdict.evidence["reason"]


def test_rows_that_are_not_reasoning_gyms(reward: GymReward) -> None:
    whole = rollout("chain_sum", 0, "Answer: 1").task.columns["gym"]
    columns: list[dict[str, Any]] = [
        {}, {"gym": {}}, {"gym": whole | {"seed": "1"}}, {"gym": whole | {"family": "chain_sums"}},
        {"gym": whole | {"options": {"min_terms": -4}}}, {"gym": whole, "answer": "another"},
    ]  # fmt: skip
    verdicts = reward.judge([Rollout.answer(Task("t", "?", c), [], [], [], "stop", "Answer: 1") for c in columns])
    assert {v.outcome for v in verdicts} == {"invalid_task"}
    assert all(v.evidence["reason"] for v in verdicts)


def test_check_says_which_rows_refuse_their_own_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "gym:spell_backward", "--reward", "gym", "--n", "20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bad"] == 0
    made = load_reward("gym")
    task = load_tasks("gym:letter_counting")[0]
    assert isinstance(made, GymReward)
    assert made.check_all([task]) == [None]
    found = made.check_all([Task("t", "?", task.columns | {"answer": "another"})])
    made.close()
    assert "another problem" in str(found[0])


@pytest.mark.parametrize("use", ["gym:limit=0", "gym:limit=true", "gym:workers=0", "gym:limit=soon"])
def test_options_out_of_range_are_said(use: str) -> None:
    with pytest.raises(RecipeError, match="gym"):
        load_reward(use)
