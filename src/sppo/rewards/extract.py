r"""The final answer of a response: in tags, in a box, behind `####` or `Answer:`, or, where nothing is marked, the last
value.

Every scan takes linear time, because a model may write a response that is slow to read.
"""

from __future__ import annotations

import re

from .unmarked import denied_before, is_value, last_number, last_value

EXTRACT = ("auto", "boxed", "marked", "hash", "number", "whole")
_MARK = re.compile(
    r"\banswers?\b[*_\s]{0,6}(?:is|are|:|=|—)(?:[*\s]{0,6}:)?|\bfinal answer[*_: ]{0,6}\n|(?<![A-Za-z])(?-i:A):"
    r"|\b(?:correct|right|best)\s(?:option|choice)\b[*_\s]{0,6}(?:is|:)(?:[*\s]{0,6}:)?|答案(?:是|为|[:：])\s?[:：]?|故选[:：]?",
    re.IGNORECASE,
)
_GOES_ON = re.compile(
    r"\*{0,2}\.\*{0,2}\s|,?\s(?:since|because|as|which|so|where|but)\b|,\sand\s(?=[A-Za-z]{2})|\s\((?=[^)]{0,60}[A-Za-z]{3})"
    r"|。|[，；]?\s?(?=[\u4e00-\u9fff])(?![或和与及])"
)
_LEADING = re.compile(
    r"(?:therefore|thus|hence|then|so|also|indeed|clearly|simply|just|now|equal to|given by|found to be),?\s(?!\s)",
    re.IGNORECASE,
)
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s{0,2}")


def extract_answer(text: str, how: str = "auto", mathematics: bool = False) -> str | None:
    """The final answer that a response gives, or None when it gives none.

    `how` is one of EXTRACT. `mathematics`: an unmarked expression counts too, not only an unmarked number.
    """
    if how == "whole":
        return text.strip() or None
    text = after_thinking(text)
    if how == "number":
        return last_number(text)
    if how == "auto" and (tagged := _tagged(text)) is not None:
        return _inside(tagged)
    if how in ("boxed", "auto"):
        content, closed = _last_box(text)
        if content is not None or how == "boxed" or not closed:
            return content
    if how in ("hash", "auto") and (hashed := after_hashes(text)) is not None:
        return hashed or None
    if how in ("marked", "auto") and (marked := _marked(text)) is not None:
        return marked
    return last_value(text, mathematics) if how == "auto" else None


def after_thinking(text: str) -> str:
    """The text after `</think>`, or all of it without tags; empty where thinking never closes."""
    closed = text.rfind("</think>")
    rest = text[closed + len("</think>") :] if closed >= 0 else text
    opened = rest.find("<think>")
    return rest if opened < 0 else rest[:opened]


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{…} (or \fbox{…}, \boxed 2), or None (also where the last one never closes)."""
    return _last_box(text)[0]


def after_last_mark(text: str) -> str | None:
    """Everything after the last `Answer:` (`A:`, `answer is`), or None when there is no such mark."""
    marks = list(_MARK.finditer(text))
    return text[marks[-1].end() :].strip() if marks else None


def _tagged(text: str) -> str | None:
    """The content of the last <answer>…</answer>, or None without one."""
    close = text.rfind("</answer>")
    opening = text.rfind("<answer>", 0, max(close, 0))
    return text[opening + len("<answer>") : close].strip() if 0 <= opening < close else None


def _inside(content: str) -> str | None:
    """The answer in a tag's content: its box, its marked answer, or all of it."""
    found = boxed(content)
    if found is None:
        found = _marked(content)
    return (found if found is not None else content.strip("*_ \n")) or None


def _last_box(text: str) -> tuple[str | None, bool]:
    """(content of the last box that holds something, whether the last box closes).

    One pass finds every brace's partner.
    """
    boxes = list(_BOX.finditer(text))
    partner = _partners(text) if boxes else {}
    unbraced: str | None = None
    last = True
    for box in reversed(boxes):
        opening = box.end()
        if text[opening : opening + 1] == "{":
            end = partner.get(opening)
            if end is None and last:
                return None, False
            last = False
            if end is not None and (content := text[opening + 1 : end].strip()):
                return content, True
        elif unbraced is None:
            unbraced = _leading_number(text, opening) or None
    return unbraced, True


def _partners(text: str) -> dict[int, int]:
    """Where each brace that is not escaped closes."""
    found: dict[int, int] = {}
    stack: list[int] = []
    escaped = False
    for i, c in enumerate(text):
        if escaped:
            escaped = False
        elif c == "\\":
            escaped = True
        elif c == "{":
            stack.append(i)
        elif c == "}" and stack:
            found[stack.pop()] = i
    return found


def _leading_number(text: str, at: int) -> str:
    end = at + (text[at : at + 1] == "-")
    while end < len(text) and (text[end].isdigit() or (text[end] in ".," and text[end + 1 : end + 2].isdigit())):
        end += 1
    return text[at:end] if text[at:end].strip("-") else ""


def after_hashes(text: str) -> str | None:
    """The line behind the last `####` that is followed by something, or None."""
    for line in reversed(text.split("\n")):
        for part in reversed(line.split("####")[1:]):
            if content := part.strip("# \t\r"):
                return content
    return None


def _marked(text: str) -> str | None:
    """The answer behind the last `Answer:` (`A:`, `the answer is`) that gives one, or None."""
    marks = list(_MARK.finditer(text))
    for mark in reversed(marks[-20:]):
        after = text[mark.end() : mark.end() + 4000].strip()
        if not after or denied_before(text, mark.start()):
            continue
        line = _whole_line(after).strip("*_` ").strip()
        if line.casefold().startswith("not ") and any(c.isdigit() for c in line):
            return None
        if clause := _first_clause(line):
            return clause
    return None


def _whole_line(after: str) -> str:
    r"""The first line, or the displayed formula that begins there; without a delimiter that opened before the mark:
    `\[Answer: 009\]`."""
    for opening, closing in (("\\[", "\\]"), ("$$", "$$")):
        if after.startswith(opening):
            end = after.find(closing, len(opening))
            return after[len(opening) : end].strip() if end >= 0 else after.split("\n", 1)[0]
    line = after.split("\n", 1)[0].strip()
    for opening, closing in (("\\[", "\\]"), ("\\(", "\\)")):
        if closing in line and opening not in line.split(closing, 1)[0]:
            line = line.split(closing, 1)[0].strip()
    bare = line.rstrip(".")
    return bare[:-1].rstrip() if bare.endswith("$") and bare.count("$") % 2 and bare.count("$") == 1 else line


def _first_clause(line: str) -> str:
    """The answer at the beginning of a line that continues: `18.

    It took 3 steps`, `18, since 9*2 = 18`. Cut only after a value.
    """
    line = line.strip("*` ").removesuffix(".").removesuffix("。").strip("*` ")
    if (leading := _LEADING.match(line)) is not None:
        line = line[leading.end() :]
    cuts = [m.start() for m in _GOES_ON.finditer(line)][:8]
    if line.startswith(("$", "\\(")):
        closing = line.find("$" if line[0] == "$" else "\\)", 2)
        after = closing + (1 if line[0] == "$" else 2)
        if closing > 0 and line[after : after + 1] in (".", ",", ";"):
            cuts.insert(0, after)
    for cut in cuts:
        clause = line[:cut].strip("*` ")
        formula = clause.startswith(("$", "\\(")) and clause.endswith(("$", "\\)"))
        if clause != line and clause[-1:] not in (",", ";") and (formula or is_value(clause)):
            return clause
    return line
