r"""The tokens of a mathematical answer, LaTeX or plain: numbers as they are written, letters, commands, marks.

A character or command without a meaning in an answer is `Unreadable`. Linear in the text; no regular expression.
"""

from __future__ import annotations

from dataclasses import dataclass


class Unreadable(Exception):
    """Why an answer cannot be read whole, in a clause."""


@dataclass(frozen=True, slots=True)
class Token:
    """`kind`: number, word, text, command, mark. `spaced`: white space stands before it."""

    kind: str
    text: str
    spaced: bool = False


_CHARACTERS = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "－": "-", "＋": "+", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "∙": "\\cdot ",
        "÷": "\\div ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "∞": "\\infty ", "π": "\\pi ", "√": "\\sqrt ", "∪": "\\cup ",
        "∩": "\\cap ", "∈": "\\in ", "∅": "\\emptyset ", "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "±": "\\pm ", "∓": "\\mp ", "°": "^\\circ ",
        "²": "^2", "³": "^3", "½": "\\frac12", "¼": "\\frac14", "¾": "\\frac34", "⅓": "\\frac13", "⅔": "\\frac23", "′": "'", "’": "'", "…": "\\ldots ",
        "\u00a0": " ", "\u2009": "\\,", "\u202f": "\\,", "\t": " ", "\n": " ", "\r": " ", "⁄": "/", "：": ":", "，": ",", "（": "(", "）": ")", "％": "%",
        "。": ".", "⟨": "\\langle ", "⟩": "\\rangle ", "→": "\\to ", "∠": "\\angle ", "△": "\\triangle ",
        "⌊": "\\lfloor ", "⌋": "\\rfloor ", "⌈": "\\lceil ", "⌉": "\\rceil ",
    }
)  # fmt: skip


def places(text: str) -> dict[str, int]:
    """The words of a text, each with its place."""
    return {name: i for i, name in enumerate(text.split())}


_LETTERS = "αβγδεζηθικλμνξρστυφχψωΓΔΘΛΞΣΦΨΩ"


GREEK = list(
    places(
        "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega "
        "Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega"
    )
)


GREEK_LETTERS = dict(zip(_LETTERS, GREEK, strict=True))


_SPACE = {",", "!", ";", ":", ">", " "} | places(
    "quad qquad thinspace enspace displaystyle textstyle limits nolimits boldsymbol bm big Big bigg Bigg bigl bigr "
    "Bigl Bigr biggl biggr Biggl Biggr left right middle hfill newline nonumber rm bf it"
).keys()


TEXT = places(
    "text textbf textit textrm textsf texttt textnormal mbox hbox mathrm operatorname mathsf mathit mathtt mathbf emph tt"
)


_ABOUT = ("approximately", "approx.", "approx", "about", "around", "roughly", "exactly", "precisely")
"""Words before a value that leave it unchanged."""


def tidy(text: str) -> str:
    r"""An answer without its surroundings: white space, `$…$`, `\(…\)`, `\[…\]`, `**…**`, a closing period, a lone
    brace pair."""
    text = text.translate(_CHARACTERS).replace("a.m.", "am").replace("p.m.", "pm").strip()
    for word in _ABOUT:
        if text[: len(word) + 1].lower() in (word + " ", word + "$"):
            text = text[len(word) :].strip()
            break
        upright, closed, rest = text.partition("}")
        if closed and upright.strip().lower() == "\\text{" + word:
            text = rest.strip()
            break
    for _ in range(8):
        before = text
        text = text.strip()
        while text.endswith(("\\,", "\\;", "\\:", "\\!")):
            text = text[:-2].rstrip()
        text = text.rstrip(",;").strip()
        if text.endswith("\\") and not text.endswith("\\\\"):
            text = text[:-1].rstrip()  # a space command whose space was stripped
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1].rstrip()
        for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`")):
            if (
                text.startswith(opening)
                and text.endswith(closing)
                and len(text) > len(opening) + len(closing)
                and opening not in text[len(opening) : -len(closing)]
                and not text.endswith("\\" + closing)
            ):
                text = text[len(opening) : -len(closing)]
        if text == before:
            break
    return text


def tokens(text: str) -> list[Token]:
    """The tokens of an answer. Raises Unreadable at a character or command that has no meaning in one."""
    out: list[Token] = []
    at, n, spaced, depth = 0, len(text), False, 0
    while at < n:
        c = text[at]
        if c in " ~":
            spaced, at = True, at + 1
            continue
        if (c.isdigit() and c.isascii()) or (c == "." and text[at + 1 : at + 2].isdigit() and text[at + 1].isascii()):
            value, at = _number(text, at, depth > 0)
            out.append(Token("number", value, spaced))
        elif c == "\\":
            at = _command(text, at, out, spaced)
            if out and out[-1].text in ("\\{", "\\}", "langle", "rangle"):
                depth += 1 if out[-1].text in ("\\{", "langle") else -1
        elif c.isalpha():
            end = at
            if c in GREEK_LETTERS:
                out.append(Token("command", GREEK_LETTERS[c], spaced))
                end = at + 1
            elif not c.isascii():
                raise Unreadable(f"it has the character {c!r}")
            else:
                while end < n and text[end].isalpha() and text[end].isascii():
                    end += 1
                out.append(Token("word", text[at:end], spaced))
            at = end
        elif text[at : at + 2] in ("<=", ">=", ":=", "==", "!="):
            out.append(Token("mark", {"!=": "ne"}.get(text[at : at + 2], text[at : at + 2]), spaced))
            at += 2
        elif text[at : at + 2] == "**":
            out.append(Token("mark", "^", spaced))
            at += 2
        elif text[at : at + 3] == "...":
            out.append(Token("command", "ldots", spaced))
            at += 3
        elif c in "+-*/^_()[]{}|,;:=<>!'&%$€£¥":
            depth += (c in "([") - (c in ")]")
            out.append(Token("mark", c, spaced))
            at += 1
        else:
            raise Unreadable(f"it has the character {c!r}")
        spaced = False
    return out


def _command(text: str, at: int, out: list[Token], spaced: bool) -> int:
    """Append the token of the command at `at`, if it has a meaning, and return where the text continues."""
    n = len(text)
    end = at + 1
    while end < n and text[end].isalpha() and text[end].isascii():
        end += 1
    name = text[at + 1 : end] or text[at + 1 : at + 2]
    end = max(end, at + 2)
    if not name:
        raise Unreadable("it ends in a backslash")
    if name in ("left", "right") and text[end : end + 1] == ".":
        return end + 1
    if name in _SPACE:
        return end
    if name in TEXT:
        start = end
        while start < n and text[start] == " ":
            start += 1
        if text[start : start + 1] != "{":
            if name.startswith("math") and start < n:
                out.append(Token("text", text[start], spaced))
                return start + 1
            raise Unreadable(f"\\{name} has no braces")
        close = text.find("}", start)
        inner = text[start + 1 : close]
        if close > 0 and name.startswith("math") and ("{" in inner or "\\" in inner):
            return start  # bold mathematics: a group like any other
        if close < 0 or "{" in inner or "\\" in inner.replace("\\ ", "").replace("\\,", ""):
            raise Unreadable(f"\\{name} holds more than text")
        out.append(Token("text", inner.replace("\\ ", " ").replace("\\,", " "), spaced))
        return close + 1
    if name in ("begin", "end"):
        close = text.find("}", end)
        if text[end : end + 1] != "{" or close < 0:
            raise Unreadable(f"\\{name} has no name")
        out.append(Token("command", f"{name} {text[end + 1 : close].strip().rstrip('*')}", spaced))
        end = close + 1
        if out[-1].text == "begin array" and text[end : end + 1] == "{":
            end = max(text.find("}", end) + 1, end + 1)
        return end
    if name == "\\" and text[end : end + 1] == "[":  # a row's end with its skip: \\[2pt]
        close = text.find("]", end, end + 12)
        if close > 0 and text[end + 1 : close].strip().endswith(("pt", "em", "ex", "mm", "cm")):
            end = close + 1
    if name in ("{", "}", "$", "%", "&", "|", "\\", "#", "_"):
        out.append(Token("mark", {"%": "%", "|": "|", "$": "\\$"}.get(name, "\\" + name), spaced))
        return end
    out.append(Token("command", name, spaced))
    return end


def _digits(text: str, at: int) -> int:
    while at < len(text) and text[at] in "0123456789":
        at += 1
    return at


_GROUPING = ("{,}", ",\\!", "\\,", "\\ ", "\\;", "\\:", "~", ",", " ")


def _number(text: str, at: int, inside: bool) -> tuple[str, int]:
    r"""A number as `float` would write it, and where it ends: `9{,}500`, `11,\! 111`, `1.2e-3`, `0.8\overline{3}` (kept
    as `0.8(3)`).

    `inside` brackets a bare comma separates members: `(1,234)` is a pair.
    """
    start, end = at, _digits(text, at)
    whole = text[start:end]
    if 0 < len(whole) <= 3:
        grouped = _grouped(text, end, inside)
        if grouped is not None:
            whole, end = whole + grouped[0], grouped[1]
    fraction = ""
    if text[end : end + 1] == "." or text[end : end + 3] == "{.}":
        after = end + (1 if text[end] == "." else 3)
        stop = _digits(text, after)
        fraction = text[after:stop]
        repeating = _repeating(text, stop)
        if repeating is not None:
            return f"{whole or '0'}.{fraction}({repeating[0]})", repeating[1]
        if fraction or text[after : after + 1] not in (".", ""):
            end = stop if fraction or not text[after : after + 1].isalpha() else end
        elif not text[after : after + 1]:
            end = stop
    value = whole + (f".{fraction}" if fraction else "")
    if text[end : end + 1] in ("e", "E"):
        sign = end + 1 + (text[end + 1 : end + 2] in ("+", "-"))
        stop = _digits(text, sign)
        if stop > sign and not text[stop : stop + 1].isalpha() and text[stop : stop + 1] != ".":
            return f"{value}e{text[end + 1 : stop]}", stop
    return value, end


def _grouped(text: str, end: int, inside: bool) -> tuple[str, int] | None:
    """The groups of three digits that follow, and where they end; None where there is none, or they are members of a
    list."""
    groups, plain_comma = "", False
    while True:
        gap = next((g for g in _GROUPING if text.startswith(g, end)), None)
        if gap is None or (gap == "," and inside):
            break
        after = end + len(gap)
        if gap in (",\\!", "{,}"):
            while text[after : after + 1] == " ":
                after += 1
        stop = _digits(text, after)
        if stop - after != 3 or (gap == " " and text[stop : stop + 1] == "/"):
            if gap == "," and stop > after:
                return None  # `1,234,5`: a list
            break
        plain_comma |= gap == ","
        groups, end = groups + text[after:stop], stop
    return (groups, end) if groups else None


def _repeating(text: str, at: int) -> tuple[str, int] | None:
    r"""The digits that repeat, from `\overline{3}`, `\bar{3}`, `\dot{3}`, `(3)` at a point, and where they end."""
    for name in ("\\overline{", "\\bar{", "\\dot{", "\\overline ", "\\bar ", "\\dot "):
        if text.startswith(name, at):
            start = at + len(name)
            stop = _digits(text, start)
            if name.endswith(" "):
                return (text[start : start + 1], start + 1) if stop > start else None
            if stop == start or text[stop : stop + 1] != "}":
                return None
            repeated, end = text[start:stop], stop + 1
            if name == "\\dot{":  # 0.\dot{1}4285\dot{7}: from the first dot to the last
                last = _digits(text, end)
                if text.startswith("\\dot{", last) and text[last + 6 : last + 7] == "}":
                    return repeated + text[end:last] + text[last + 5], last + 7
            return repeated, end
    if text[at : at + 1] == "(" and text[at - 1 : at] == ".":
        stop = _digits(text, at + 1)
        if stop > at + 1 and text[stop : stop + 1] == ")":
            return text[at + 1 : stop], stop + 1
    return None
