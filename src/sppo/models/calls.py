"""Calls of tools, as models of each family write them.

Which way a model writes them is asked of its chat template: it is shown a call, and what it makes of it is recognised.

    json       <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>               Hermes, Qwen 2.5 and 3
    xml        <tool_call><function=add><parameter=a>1</parameter></function></tool_call>  Qwen 3.5, Qwen3-Coder, Nemotron 3
    keys       <tool_call>add<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>      GLM 4.5
    llama      {"name": "add", "parameters": {"a": 1}}, or <|python_tag|>add.call(a=1)      Llama 3
    mistral    [TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}], or [TOOL_CALLS]add[ARGS]{"a": 1}
    gemma      <|tool_call>call:add{a:1}<tool_call|>                                        Gemma 4
    harmony    … to=functions.add<|channel|>commentary json<|message|>{"a": 1}<|call|>      gpt-oss
    python     [add(a=1)]                                                                   LFM2; models without a template

What a model wrote is hostile: it is read from left to right, once, and never evaluated. A call that cannot be read is one with an `error`,
which the model is told.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from ..environments.base import POSITIONAL, Call
from ..errors import ModelError
from ..types import Message, Task
from .literals import Unreadable, gemma_calls, python_calls
from .loading import render_chat

Read = tuple[str, list[Call]]
"""A reply without its calls, and the calls."""
SHOWN: list[Message] = [
    {"role": "user", "content": "."},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "shown", "arguments": {"key": "told"}}}],
    },
]
"""A conversation with a call, for templates."""
MOST_CALLS = 64
"""Calls that are read in one reply; the rest is one that cannot be."""


def syntax_of(tokenizer: Any) -> str:
    """The name of the syntax in which a model's chat template writes calls, "" where it writes none."""
    try:
        written = render_chat(tokenizer, Task("calls", SHOWN), answer=False)
    except ModelError:
        return ""
    signs = {
        "[TOOL_CALLS]": "mistral", "<|tool_call>call:shown": "gemma", "to=functions.shown": "harmony", "<function=shown>": "xml",
        "<arg_key>": "keys", "<tool_call>": "json", "shown(key=": "python", '"parameters"': "llama",
    }  # fmt: skip
    return next((name for sign, name in signs.items() if sign in written), "") if "shown" in written else ""


def read_calls(text: str, syntax: str) -> Read:
    """What a reply says beside its calls, and the calls in it, in order. What is thought (`<think>`) calls nothing.

    >>> read_calls('So: <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', "json")
    ('So:', [Call(name='add', arguments={'a': 1}, error='')])
    >>> read_calls("[add(a=1)]", "python")[1][0].arguments
    {'a': 1}
    """
    thought, mark, said = text.rpartition("</think>")
    content, calls = SYNTAXES[syntax](said)
    if len(calls) > MOST_CALLS:
        calls = [*calls[:MOST_CALLS], Call(error=f"{len(calls)} calls in one turn: at most {MOST_CALLS} are read")]
    return (thought + mark + content).strip(), calls


def spelt(message: Message, syntax: str) -> str:
    """A turn with its calls as a model writes it in one of the syntaxes, to imitate; `read_calls` reads it."""
    calls = [call["function"] for call in message["tool_calls"]]
    each = [_spelt(call["name"], call["arguments"], syntax) for call in calls]
    if syntax == "python":
        each = [f"[{', '.join(each)}]"]
    content = str(message.get("content") or "")
    return (content + "\n" if content else "") + ("; " if syntax == "llama" else "\n").join(each)


def _spelt(name: str, arguments: Mapping[str, Any], syntax: str) -> str:
    written = partial(json.dumps, ensure_ascii=False)
    if syntax == "python":
        placed = [repr(value) for value in arguments.get(POSITIONAL, ())]
        named = [f"{key}={value!r}" for key, value in arguments.items() if key != POSITIONAL]
        return f"{name}({', '.join([*placed, *named])})"
    if syntax == "llama":
        return written({"name": name, "parameters": arguments})
    if syntax == "mistral":
        return f"[TOOL_CALLS][{written({'name': name, 'arguments': arguments})}]"
    if syntax == "harmony":
        return f"<|channel|>commentary to=functions.{name}<|message|>{written(arguments)}<|call|>"
    if syntax == "gemma":
        return f"<|tool_call>call:{name}{{{','.join(f'{k}:{_of_gemma(v)}' for k, v in arguments.items())}}}<tool_call|>"
    values = {key: value if isinstance(value, str) else written(value) for key, value in arguments.items()}
    if syntax == "xml":
        inside = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items())
        return f"<tool_call>\n<function={name}>\n{inside}</function>\n</tool_call>"
    if syntax == "keys":
        inside = "".join(f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in values.items())
        return f"<tool_call>{name}\n{inside}</tool_call>"
    return f"<tool_call>\n{written({'name': name, 'arguments': arguments})}\n</tool_call>"


def _of_gemma(value: Any) -> str:
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, list):
        return f"[{','.join(map(_of_gemma, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{k}:{_of_gemma(v)}' for k, v in value.items())}}}"
    return json.dumps(value)


# -- one syntax each -------------------------------------------------------------------------------------------------------


def _in_tags(
    body: Callable[[str], list[Call]], begin: str = "<tool_call>", end: str = "</tool_call>"
) -> Callable[[str], Read]:
    def read(text: str) -> Read:
        calls, content = list[Call](), list[str]()
        for inside, piece in _tagged(text, begin, end):
            if inside:
                calls += body(piece)
            else:
                content.append(piece)
        return "".join(content), calls

    return read


def _tagged(text: str, begin: str, end: str) -> Iterator[tuple[bool, str]]:
    """The pieces of a text, those between two tags marked; a last one may lack its end."""
    at = 0
    while (start := text.find(begin, at)) >= 0:
        yield False, text[at:start]
        start += len(begin)
        stop = text.find(end, start)
        if stop < 0:
            yield True, text[start:]
            return
        yield True, text[start:stop]
        at = stop + len(end)
    yield False, text[at:]


def _from_json(body: str) -> list[Call]:
    try:
        found = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        return [Call(error=f"the call is no JSON: {_why(error)}")]
    return [_named(one) for one in (found if isinstance(found, list) else [found])]


def _named(found: Any) -> Call:
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return Call(error='a call is {"name": …, "arguments": {…}}')
    arguments = found.get("arguments", found.get("parameters", {}))
    if isinstance(arguments, str):  # some write it as a text that holds JSON
        try:
            arguments = json.loads(arguments, parse_constant=_no_number)
        except (ValueError, RecursionError):
            return Call(found["name"], error="its arguments are a text that is no JSON")
    if not isinstance(arguments, dict):
        return Call(found["name"], error="its arguments are no object")
    return Call(found["name"], arguments)


def _from_xml(body: str) -> list[Call]:
    calls = list[Call]()
    for inside, piece in _tagged(body, "<function=", "</function>"):
        if not inside:
            continue
        name, closed, rest = piece.partition(">")
        if not closed:
            return [Call(error="a call is <function=NAME>…</function>")]
        arguments = dict[str, Any]()
        for within, pair in _tagged(rest, "<parameter=", "</parameter>"):
            if within:
                key, closed, value = pair.partition(">")
                if not closed:
                    return [Call(name.strip(), error="a parameter is <parameter=NAME>value</parameter>")]
                arguments[key.strip()] = value.removeprefix("\n").removesuffix("\n")
        calls.append(Call(name.strip(), arguments))
    return calls or [Call(error="a call is <function=NAME>…</function>")]


def _from_keys(body: str) -> list[Call]:
    name, mark, rest = body.partition("<arg_key>")
    arguments = dict[str, Any]()
    for inside, pair in _tagged(mark + rest, "<arg_key>", "</arg_value>"):
        if inside:
            key, closed, value = pair.partition("</arg_key>")
            value = value.strip()
            if not closed or not value.startswith("<arg_value>"):
                return [Call(name.strip(), error="an argument is <arg_key>NAME</arg_key><arg_value>value</arg_value>")]
            arguments[key.strip()] = value.removeprefix("<arg_value>")
    return [Call(name.strip(), arguments)] if name.strip() else [Call(error="the call has no name")]


def _llama(text: str) -> Read:
    """A reply that calls is nothing but calls."""
    said = text.strip()
    tagged = said.startswith("<|python_tag|>")
    body = said.removeprefix("<|python_tag|>").strip()
    if not body.startswith("{"):
        return ("", _built_in(body)) if tagged else (text, [])
    decoder, calls, at = json.JSONDecoder(parse_constant=_no_number), list[Call](), 0
    while at < len(body):
        try:
            found, at = decoder.raw_decode(body, at)
        except (ValueError, RecursionError) as error:
            if not tagged and not calls and '"name"' not in body:
                return text, []  # an answer that begins with a brace
            return "", [*calls, Call(error=f"the call is no JSON: {_why(error)}")]
        if not tagged and not calls and not (isinstance(found, dict) and {"name", "parameters"} <= found.keys()):
            return text, []
        calls.append(_named(found))
        while at < len(body) and (body[at].isspace() or body[at] == ";"):
            at += 1
    return "", calls


def _built_in(body: str) -> list[Call]:
    """`name.call(key="value")`, or the code of Llama's own interpreter."""
    name, dot, rest = body.partition(".call(")
    if not dot or not name.isidentifier():
        return [Call("python", {"code": body})]
    try:
        return python_calls(f"{name}({rest}")
    except Unreadable as error:
        return [Call(name, error=str(error))]


def _mistral(text: str) -> Read:
    content, mark, body = text.partition("[TOOL_CALLS]")
    if not mark:
        return text, []
    if "[ARGS]" not in body:
        return content, [call for piece in body.split("[TOOL_CALLS]") for call in _from_json(piece)]
    calls = list[Call]()
    for piece in body.split("[TOOL_CALLS]"):
        name, _, arguments = piece.partition("[ARGS]")
        read = _from_json(f'{{"name": {json.dumps(name.strip())}, "arguments": {arguments}}}')
        calls += [Call(name.strip(), error=c.error) if c.error else c for c in read]
    return content, calls


def _python(text: str) -> Read:
    """A reply that is a list of calls, or whose last line is one; LFM2 puts it between tags."""
    content, mark, body = text.rpartition("<|tool_call_start|>")
    if mark:
        body = body.partition("<|tool_call_end|>")[0]
    else:
        said = text.strip()
        content, newline, body = ("", "", said) if said.startswith("[") else said.rpartition("\n")
        content += newline
        if not body.startswith("["):
            return text, []
    try:
        return content, python_calls(body)
    except Unreadable as error:
        looks = mark or ("(" in body and body[1 : body.index("(")].strip().isidentifier())
        return (content, [Call(error=str(error))]) if looks else (text, [])


def _from_gemma(body: str) -> list[Call]:
    try:
        return gemma_calls(body)
    except Unreadable as error:
        return [Call(error=str(error))]


def _harmony(text: str) -> Read:
    """Messages of several channels, one of which may go to a function; what is said is in the last one."""
    calls, content = list[Call](), ""
    for message in text.split("<|start|>"):
        head, _, body = message.partition("<|message|>")
        body = body.partition("<|end|>")[0].partition("<|return|>")[0].partition("<|call|>")[0]
        _, to, rest = head.partition("to=functions.")
        if to:
            name = rest.partition("<|channel|>")[0].split()[:1]
            found = _from_json(f'{{"name": {json.dumps("".join(name))}, "arguments": {body}}}')
            calls += [Call("".join(name), error=c.error) if c.error else c for c in found]
        elif "analysis" not in head:
            content = body or head
    return content, calls


def _none(text: str) -> Read:
    return text, []


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _why(error: BaseException) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


SYNTAXES: dict[str, Callable[[str], Read]] = {
    "": _none, "json": _in_tags(_from_json), "xml": _in_tags(_from_xml), "keys": _in_tags(_from_keys), "llama": _llama, "mistral": _mistral,
    "gemma": _in_tags(_from_gemma, "<|tool_call>", "<tool_call|>"), "harmony": _harmony, "python": _python,
}  # fmt: skip
