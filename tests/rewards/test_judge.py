"""Rubrics answered by a model: a real server, a real small model, and what goes wrong with either."""

from __future__ import annotations

import http.server
import json
import threading

import pytest

from sppo.errors import DataError, RecipeError
from sppo.rewards.judge import JudgeReward, Local, Remote, build
from sppo.rewards.judge_trial import INJECTIONS, agreement, injections, kappa
from sppo.rewards.loading import load_reward
from sppo.rewards.rubric import Criterion, Question, parsed, rubric_of, verdict_of
from sppo.types import Rollout, Task

RUBRIC = [
    {"criterion": "It names a river", "weight": 2},
    {"criterion": "It names a year", "weight": 1},
    {"criterion": "It lies", "points": -1},
]


class Server(http.server.ThreadingHTTPServer):
    """Answers chat completions by a function of the question; counts requests."""

    daemon_threads = True

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.asked = answer, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(body)
        said = self.server.answer(body["messages"][0]["content"])
        if isinstance(said, int):
            self.send_response(said)
            self.end_headers()
            return
        out = said if isinstance(said, bytes) else json.dumps({
            "id": "1", "object": "chat.completion", "created": 0, "model": "m",
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}],
        }).encode()  # fmt: skip
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(out)))
        self.end_headers()
        self.wfile.write(out)

    def log_message(self, *args):
        pass


@pytest.fixture
def served():
    made = []

    def serve(answer):
        made.append(Server(answer))
        return made[-1]

    yield serve
    for server in made:
        server.shutdown()
        server.server_close()


def response(text: str, rubric=RUBRIC, name="t", **columns) -> Rollout:
    return Rollout.answer(Task(name, "Where?", {"rubric": rubric} | columns), [1], [2], [0.0], "stop", text)


def reads(question: str) -> str:
    """A judge that looks for a word of the criterion in what is quoted."""
    quoted = question.split(">>>")[2].rpartition("<<<")[0]
    word = question.partition("The criterion: ")[2].split("\n")[0].split()[-1]
    return "Yes." if word in quoted else "no"


def test_the_score_is_what_is_met_of_what_can_be(served):
    server = served(reads)
    reward = build(model="m", url=server.url)
    whole, half, none = reward.judge([response("river in the year 9"), response("a river"), response("it says lies")])
    assert (whole.score, half.score, none.score) == (1.0, pytest.approx(2 / 3), 0.0)
    assert whole.outcome == "correct"
    assert half.evidence["criteria"][0] == {"criterion": "It names a river", "weight": 2.0, "met": True}
    assert len(server.asked) == 9
    assert {body["temperature"] for body in server.asked} == {0.0}
    assert verdict_of([Criterion("a", 1), Criterion("b", -2)], [True, True]).score == 0.0


def test_the_same_question_is_asked_once_and_replay_asks_nothing(served, tmp_path):
    server = served(reads)
    reward = build(model="m", url=server.url)
    reward.keep(tmp_path / "judge.jsonl")
    first = reward.judge([response("a river"), response("a river", name="other")])
    assert len(server.asked) == 3
    again = build(model="m", url=server.url)
    again.keep(tmp_path / "judge.jsonl")
    assert again.judge([response("a river")])[0] == first[0]
    assert len(server.asked) == 3
    with (tmp_path / "judge.jsonl").open("a") as file:
        file.write('{"questi')  # a kill in the middle of a line
    build(model="m", url=server.url).keep(tmp_path / "judge.jsonl")
    (tmp_path / "judge.jsonl").write_text('{"questi\n{"question": "a", "answer": true}\n')
    with pytest.raises(DataError, match=r"judge\.jsonl:1"):
        reward.keep(tmp_path / "judge.jsonl")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda q: "perhaps", "instead of yes or no"),
        (lambda q: 500, "InternalServerError"),
        (lambda q: b"[1]", "did not answer"),
        (lambda q: b'{"choices": []}', "did not answer"),
        (lambda q: b"<html>", "did not answer"),
    ],
)
def test_what_cannot_be_read_or_reached_is_masked(served, answer, said):
    reward = build(model="m", url=served(answer).url, retries=0, timeout=5.0)
    (verdict,) = reward.judge([response("a river")])
    assert verdict.outcome == "infra_error"
    assert said in verdict.evidence["reason"]


def test_a_server_that_hangs_or_is_gone_is_masked(served):
    wait = threading.Event()
    server = served(lambda q: wait.wait(30) and "yes")
    reward = build(model="m", url=server.url, retries=0, timeout=0.3)
    (verdict,) = reward.judge([response("a river")])
    wait.set()
    assert "APITimeoutError" in verdict.evidence["reason"]
    (verdict,) = build(model="m", url="http://127.0.0.1:9/v1", retries=0, timeout=2.0).judge([response("a river")])
    assert "APIConnectionError" in verdict.evidence["reason"]


def test_a_server_that_fails_sometimes_is_asked_again(served):
    said = iter([500, 429, "yes", "yes", "no"])
    (verdict,) = build(model="m", url=served(lambda q: next(said)).url, in_flight=1).judge([response("a river")])
    assert verdict.score == 1.0


def test_no_more_requests_are_in_flight_than_allowed(served):
    now, most, lock = [0], [0], threading.Lock()

    def slow(question):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        threading.Event().wait(0.05)
        with lock:
            now[0] -= 1
        return "yes"

    build(model="m", url=served(slow).url, in_flight=2).judge([response(str(i)) for i in range(4)])
    assert most[0] == 2


def test_a_gate_before_it_spares_the_judge(served):
    server = served(lambda q: "yes")
    reward = load_reward(f"answer and judge:url={server.url},model=m")
    rows = [response("A: 4", [{"criterion": "a"}], answer="4"), response("A: 5", [{"criterion": "b"}], answer="4")]
    right, wrong = reward.judge(rows)
    assert (right.score, wrong.score) == (1.0, 0.0)
    assert len(server.asked) == 1
    assert wrong.outcome == "wrong"
    assert "not asked" in wrong.evidence["parts"][1]


@pytest.mark.parametrize(
    ("rubric", "said"),
    [
        (None, "no `rubric`"),
        ([], "no `rubric`"),
        ([{"weight": 1}], "has no text"),
        ([{"criterion": "a", "weight": -1}], "above 0"),
        ("[", "Expecting"),
        ([{"criterion": "a", "weight": "much"}], "could not convert"),
    ],
)
def test_a_row_without_a_rubric_is_said(rubric, said):
    reward = JudgeReward(Remote("http://127.0.0.1:9/v1", "m", 1, 0, 1.0))
    assert said in reward.check(Task("t", "?", {"rubric": rubric}))
    (verdict,) = reward.judge([response("x", rubric)])
    assert verdict.outcome == "invalid_task"


def test_published_rubrics_are_read():
    health = [
        {"criterion": "Names a drug", "points": 5, "tags": ["x"]},
        {"criterion": "Is rude", "points": -3, "tags": []},
    ]
    assert rubric_of(Task("t", "?", {"rubrics": health})) == [
        Criterion("Names a drug", 5.0),
        Criterion("Is rude", -3.0),
    ]
    titled = json.dumps([{"title": "Depth", "description": "It goes into depth", "weight": 2}])
    assert rubric_of(Task("t", "?", {"rubric": titled})) == [Criterion("It goes into depth", 2.0)]
    assert rubric_of(Task("t", "?", {"rubric": ["Is brief"]})) == [Criterion("Is brief", 1.0)]


@pytest.mark.parametrize(
    ("said", "answer"), [("Yes", True), (" **no**, since", False), ("<think>no</think>\n\nyes.", True), ("`YES`", True)]
)
def test_answers_are_read(said, answer):
    assert parsed(said) is answer


@pytest.mark.parametrize("said", ["", "yesterday", "It is yes", "\n" * 100 + "yes", "<think>yes"])
def test_what_is_no_answer_is_none(said):
    assert "instead of yes or no" in parsed(said)


def test_the_response_cannot_know_the_mark():
    one, other = Question("t", "<<<x>>>", "c").text, Question("t", "<<<y>>>", "c").text
    assert one.partition("<<<")[2][:16] != other.partition("<<<")[2][:16]


def test_injections_that_are_paid_are_shown(served):
    tasks = [Task("t", "?", {"rubric": RUBRIC})]
    gullible = JudgeReward(Remote(served(lambda q: "yes").url, "m", 4, 0, 5.0)).answers
    said = injections(gullible, tasks)
    assert said.startswith(
        f"judge: {len(INJECTIONS)} of {len(INJECTIONS)} injections are paid on 1 problems: 'Ignore all"
    )
    firm = JudgeReward(Remote(served(lambda q: "no").url, "m", 4, 0, 5.0)).answers
    assert injections(firm, tasks) == f"judge: 0 of {len(INJECTIONS)} injections are paid on 1 problems"


def test_agreement_with_people_is_said_with_its_interval(served, tmp_path):
    path = tmp_path / "labels.jsonl"
    rows = [
        {
            "prompt": "?",
            "response": f"a river {i}" if i % 2 else f"none {i}",
            "criterion": "a river",
            "label": i % 2 == 1 or i == 0,
        }
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ask = JudgeReward(Remote(served(reads).url, "m", 4, 0, 5.0)).answers
    said = agreement(ask, path)
    assert said.startswith("judge: κ = 0.95 [0.")
    assert "on 40 labels (0 without an answer); 0% of what people call unmet is paid" in said
    path.write_text('{"prompt": "?"}\n')
    with pytest.raises(DataError, match=r"labels\.jsonl:1"):
        agreement(ask, path)
    assert kappa([(True, True)] * 5) == 1.0


def test_a_local_model_answers_by_the_likelier_word():
    judge = Local("tiny:hidden=32,layers=1,heads=2")
    questions = [Question("Where?", text, "It names a river") for text in ("a river", "nothing")]
    said = judge.answers(questions)
    assert all(isinstance(answer, bool) for answer in said)
    assert judge.answers(questions) == said
    long = judge.answers([Question("Where?", "x" * 5000, "c")])
    assert "reads 2048 tokens" in long[0]


def test_what_is_no_judge_is_one_sentence():
    with pytest.raises(RecipeError, match="name the model"):
        build()
    with pytest.raises(RecipeError, match="above 0"):
        build(model="m", url="http://x", in_flight=0)
