"""Units by their base units: `km/h`, `m/s^2`, `dollars`, `%`. Exact factors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

BASES = ("m", "kg", "s", "A", "K", "mol", "cd", "currency", "currency€", "currency£", "currency¥", "item", "degree")
_TABLE: dict[str, tuple[str, str]] = {  # unit: (factor, base units)
    "m": ("1", "m"), "g": ("1/1000", "kg"), "s": ("1", "s"), "A": ("1", "A"), "K": ("1", "K"), "mol": ("1", "mol"), "cd": ("1", "cd"),
    "min": ("60", "s"), "h": ("3600", "s"), "hr": ("3600", "s"), "day": ("86400", "s"), "week": ("604800", "s"),
    "in": ("127/5000", "m"), "ft": ("381/1250", "m"), "yd": ("1143/1250", "m"), "mi": ("201168/125", "m"),
    "lb": ("45359237/100000000", "kg"), "oz": ("45359237/1600000000", "kg"), "t": ("1000", "kg"), "ton": ("1000", "kg"),
    "l": ("1/1000", "m m m"), "L": ("1/1000", "m m m"), "gal": ("473176473/125000000000", "m m m"),
    "N": ("1", "kg m /s /s"), "J": ("1", "kg m m /s /s"), "W": ("1", "kg m m /s /s /s"),
    "Pa": ("1", "kg /m /s /s"), "Hz": ("1", "/s"), "C": ("1", "A s"), "V": ("1", "kg m m /s /s /s /A"), "ohm": ("1", "kg m m /s /s /s /A /A"),
    "eV": ("1602176634/10000000000000000000000000000", "kg m m /s /s"), "cal": ("523/125", "kg m m /s /s"), "kWh": ("3600000", "kg m m /s /s"),
    "$": ("1", "currency"),
    "€": ("1", "currency€"), "£": ("1", "currency£"), "¥": ("1", "currency¥"), "¢": ("1/100", "currency"),
    "%": ("1/100", ""), "degree": ("1", "degree"), "rad": ("1", ""),
}  # fmt: skip
_WORDS = {
    "meter": "m", "metre": "m", "gram": "g", "second": "s", "sec": "s", "minute": "min", "hour": "h", "hrs": "h", "gallon": "gal", "inch": "in", "inche": "in",
    "foot": "ft", "feet": "ft", "yard": "yd", "mile": "mi", "pound": "lb", "ounce": "oz", "liter": "l", "litre": "l",
    "newton": "N", "joule": "J", "watt": "W", "volt": "V", "amp": "A", "ampere": "A", "kelvin": "K", "hertz": "Hz", "pascal": "Pa",
    "dollar": "$", "usd": "$", "cent": "¢", "percent": "%", "Ω": "ohm", "mph": "mi/h", "kph": "km/h", "sq": "", "lbs": "lb", "calorie": "cal",
    "deg": "degree", "euro": "€", "eur": "€", "yen": "¥", "radian": "rad",
}  # fmt: skip
_PREFIXES = {"n": -9, "µ": -6, "μ": -6, "m": -3, "c": -2, "d": -1, "k": 3, "M": 6, "G": 9}
_LONG = {"nano": -9, "micro": -6, "milli": -3, "centi": -2, "kilo": 3, "mega": 6, "giga": 9}
_PREFIXED = {"m", "g", "s", "l", "L", "N", "J", "W", "Pa", "Hz", "V", "A", "eV", "cal", "ohm", "t", "K", "mol", "C"}
_PART = re.compile(r"([*/·⋅]?)\s{0,2}([A-Za-zµμΩ$¢€£¥%]+)(?:\s{0,2}\^\s{0,2}\{?(-?\d)\}?|\{?(-?\d)\}?|([²³]))?\s{0,2}")
LONGEST = 40


@dataclass(frozen=True)
class Unit:
    """A factor to base units, and the exponent of each base."""

    factor: Fraction
    powers: tuple[tuple[str, int], ...]


def unit(text: str) -> Unit | None:
    """The unit that a text is, or None: `km/h`, `m/s^2`, `kg m`, `dollars`, `%`, `\\text{ cm}^2`."""
    text = (
        re.sub(r"\\(?:text|mathrm|operatorname)\s?\{([^{}]*)\}", r"\1", text)
        .replace("\\", " ")
        .replace(" per ", "/")
        .strip(" .")
    )
    text = re.sub(r"^\s?[dt]?frac\s?\{([^{}]+)\}\{([^{}]+)\}$", r"\1/\2", text)
    if len(text) > LONGEST:
        return None
    text = re.sub(r"^(?:square|sq)\s(\w+)$", r"\1^2", re.sub(r"^cubic\s(\w+)$", r"\1^3", text))
    factor, powers, at = Fraction(1), dict.fromkeys(BASES, 0), 0
    while at < len(text):
        match = _PART.match(text, at)
        if match is None or match.end() == at:
            return None
        sign, name, above, beside, raised = match.groups()
        digit = above or beside
        known = _known(name)
        if known is None:
            return None
        exponent = int(digit or {"²": 2, "³": 3}.get(raised or "", 1)) * (-1 if sign == "/" else 1)
        factor *= known[0] ** exponent
        for base, power in known[1].items():
            powers[base] += power * exponent
        at = match.end()
    return Unit(factor, tuple((b, p) for b, p in powers.items() if p))


def _known(name: str, plain: bool = False) -> tuple[Fraction, dict[str, int]] | None:
    """Factor and base exponents of one unit's name: as it is, as a word (also in the plural), with a prefix."""
    if name in _TABLE:
        factor, bases = _TABLE[name]
        powers: dict[str, int] = {}
        for base in bases.split():
            powers[base.lstrip("/")] = powers.get(base.lstrip("/"), 0) + (-1 if base.startswith("/") else 1)
        return Fraction(factor), powers
    for word in (name, name.lower(), name.lower().removesuffix("s")):
        if word in _WORDS:
            whole = unit(_WORDS[word])
            return (whole.factor, dict(whole.powers)) if whole else None
        if len(word) > 2 and word in _TABLE:
            return _known(word)
    if plain:
        return None
    for prefixes in (_LONG, _PREFIXES):
        for prefix, exponent in prefixes.items():
            rest = name.removeprefix(prefix)
            if rest != name and rest and (prefixes is _LONG or rest in _PREFIXED):
                inner = _known(rest, plain=True)
                if inner:
                    return inner[0] * Fraction(10) ** exponent, inner[1]
    return None
