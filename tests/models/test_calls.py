"""Calls of tools, as the chat templates of each family write them and as hostile models do."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import trl

from sppo.environments.base import Call
from sppo.environments.toolbox import fitting
from sppo.models.calls import MOST_CALLS, SYNTAXES, read_calls, syntax_of
from sppo.models.literals import Unreadable, python_calls
from sppo.models.loading import render_chat
from sppo.models.tiny import character_tokenizer
from sppo.types import Task

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
FAMILIES = {
    "qwen2_5": "json", "qwen3": "json", "qwen3_instruct_2507": "json", "qwen3_5_think": "xml", "qwen3_6": "xml", "nemotron_3_nano": "xml",
    "glm4moe": "keys", "llama3_1": "llama", "llama3_2": "llama", "lfm2_2_5": "python", "gemma4": "gemma", "gptoss": "harmony",
    "gemma3": "", "llama3": "", "phi3": "",
}  # fmt: skip
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% elif m.tool_calls %}[TOOL_CALLS]["
    "{% for c in m.tool_calls %}{{ c.function | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
ARGUMENTS = {
    "text": "a \"quoted\" word, a 'single' one,\nand < & { [ ( \\ é 漢",
    "number": 17,
    "share": -0.25,
    "flag": True,
    "items": [1, 2, 3],
}
SCHEMAS = {"text": "string", "number": "integer", "share": "number", "flag": "boolean", "items": "array"}


def tokenizer_of(template: str):
    tokenizer = character_tokenizer()
    tokenizer.bos_token = "<eos>"
    tokenizer.chat_template = template
    return tokenizer


def template_of(family: str) -> str:
    return MISTRAL if family == "mistral" else (TEMPLATES / f"{family}.jinja").read_text()


@pytest.mark.parametrize(("family", "syntax"), [*FAMILIES.items(), ("mistral", "mistral")])
def test_the_syntax_is_found_in_the_template_and_its_calls_are_read_back(family, syntax):
    tokenizer = tokenizer_of(template_of(family))
    assert syntax_of(tokenizer) == syntax
    if not syntax:
        return
    arguments = ARGUMENTS | ({"text": "plain"} if syntax == "python" else {})  # LFM2's template escapes no quotes
    call = {"type": "function", "function": {"name": "look_up", "arguments": arguments}}
    asked = [{"role": "user", "content": "What?"}]
    prompt = render_chat(tokenizer, Task("t", asked))
    whole = render_chat(
        tokenizer, Task("t", [*asked, {"role": "assistant", "content": "", "tool_calls": [call]}]), answer=False
    )
    begun = prompt if whole.startswith(prompt) else prompt.rpartition("<think>")[0]
    said = whole[len(begun) :].replace("<|eot_id|>", "").replace("<|im_end|>", "").replace("<eos>", "")
    content, calls = read_calls(said, syntax)
    assert [c.name for c in calls] == ["look_up"]
    assert not calls[0].error
    assert "look_up" not in content
    read = {k: fitting(v, {"type": SCHEMAS[k]}, k) for k, v in calls[0].arguments.items()}
    assert read == arguments


def test_what_is_thought_calls_nothing():
    text = '<think>maybe <tool_call>{"name": "a"}</tool_call></think>\n\nno'
    assert read_calls(text, "json") == (text, [])


def test_several_calls_come_in_order_and_the_rest_is_content():
    text = 'First\n<tool_call>{"name": "a", "arguments": {"x": 1}}</tool_call>\n<tool_call>{"name": "b", "arguments": "{\\"y\\": 2}"}</tool_call>'
    content, calls = read_calls(text, "json")
    assert content == "First"
    assert calls == [Call("a", {"x": 1}), Call("b", {"y": 2})]
    assert read_calls("[a(1, y='z'), b()]", "python")[1] == [Call("a", {"*": [1], "y": "z"}), Call("b")]
    assert read_calls('{"name": "a", "parameters": {}}; {"name": "b", "parameters": {}}', "llama")[1] == [
        Call("a"), Call("b"),
    ]  # fmt: skip
    assert read_calls('<|python_tag|>search.call(query="x")', "llama")[1] == [Call("search", {"query": "x"})]
    assert read_calls('[TOOL_CALLS]a[ARGS]{"x": 1}', "mistral")[1] == [Call("a", {"x": 1})]


@pytest.mark.parametrize(
    ("syntax", "text", "said"),
    [
        ("json", "<tool_call>{", "no JSON"),
        ("json", "<tool_call>[1]</tool_call>", '{"name"'),
        ("json", '<tool_call>{"name": "a", "arguments": [1]}</tool_call>', "no object"),
        ("json", '<tool_call>{"name": "a", "arguments": {"x": NaN}}</tool_call>', "NaN"),
        ("json", f"<tool_call>{'[' * 100_000}</tool_call>", "deep"),
        ("xml", "<tool_call>look up</tool_call>", "<function=NAME>"),
        ("xml", "<tool_call><function=a", "<function=NAME>"),
        ("keys", "<tool_call>a<arg_key>x</arg_key>1</tool_call>", "<arg_key>"),
        ("llama", '{"name": "a", "parameters": ', "no JSON"),
        ("mistral", "[TOOL_CALLS]nothing", "no JSON"),
        ("gemma", "<|tool_call>call:a{x:<tool_call|>", "a value"),
        ("harmony", "<|channel|>commentary to=functions.a<|message|>{<|call|>", "no JSON"),
        ("python", "[a(", "expected"),
        ("python", "[a(x=__import__('os'))]", "a value"),
        ("python", f"[a({'[' * 100})]", "deep"),
        ("python", "[a(x=1e999)]", "a number"),
    ],
)
def test_a_call_that_cannot_be_read_says_why(syntax, text, said):
    _, calls = read_calls(text, syntax)
    assert len(calls) == 1
    assert said in calls[0].error


@pytest.mark.parametrize(
    ("syntax", "text"),
    [
        ("llama", '{"answer": 3}'),
        ("llama", "{1, 2} is a set"),
        ("python", "[1, 2, 3]"),
        ("python", "x[a(1)]"),
        ("json", "no <tool>"),
        ("", "[a()]"),
    ],
)
def test_an_answer_is_no_call(syntax, text):
    assert read_calls(text, syntax) == (text, [])


def test_floods_of_calls_are_cut_and_said():
    _, calls = read_calls('<tool_call>{"name": "a"}</tool_call>' * 1000, "json")
    assert len(calls) == MOST_CALLS + 1
    assert "1000 calls" in calls[-1].error


HOSTILE = (
    "<tool_call>", "</tool_call>", "<function=", "<parameter=", "<arg_key>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<|tool_call>", "[a(", "[a('",
    "<|start|>to=functions.", "{", "\\", "a" * 50 + "(", "]", "</think>", "[TOOL_CALLS]a[ARGS]{}", '{"name": "a", "parameters": {}};',
)  # fmt: skip


@pytest.mark.parametrize("syntax", [s for s in SYNTAXES if s])
@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_text_is_read_in_linear_time(syntax, piece):
    def seconds(count: int) -> float:
        text = piece * (count // len(piece))
        times = []
        for _ in range(3):
            began = time.perf_counter()
            read_calls(text, syntax)
            times.append(time.perf_counter() - began)
        return min(times)

    short, long = seconds(20_000), seconds(160_000)
    assert long < 0.05 or long < 24 * short, (short, long)  # eight times the text; quadratic: sixty-four times


@pytest.mark.parametrize(
    "text", ["a(1, 2", "a(x=1, 2)", "1()", "", "a", "[a()", "a() b()", "a('\\u12')", "a(0x10)", "a({1: 2})"]
)
def test_what_is_no_call_of_literals_is_refused(text):
    with pytest.raises(Unreadable):
        python_calls(text)


def test_literals_are_pythons_and_jsons():
    text = """f(a=[1, -2.5, +3, 1_000], b={'k': (None, true)}, c="é\\n\\u0041\\x41", d='''two\nlines''', e=null,)"""
    (call,) = python_calls(text)
    assert call.arguments == {
        "a": [1, -2.5, 3, 1000], "b": {"k": [None, True]}, "c": "é\nAA", "d": "two\nlines", "e": None,
    }  # fmt: skip
    json.dumps(call.arguments)
