"""What a learner and `sppo rollout serve` send each other: JSON and raw bytes, checked where they arrive.

    GET  /hello     ?nonce=        no token                              {"proof"}: the server has the token
    GET  /health    {}                                                   who it is, what it holds, what it does
    GET  /layout    {}                                                   the model: every weight's name, dtype and shape
    POST /load      {"version", "layout"}                                {"load": ID}; from now on it holds nothing
    POST /weight    ?load=ID&name=&dtype=&shape=2,3&fingerprint=         one tensor, its bytes as the body
    POST /loaded    {"load"}                                             it holds these weights, if they are whole
    POST /generate  {"load", "prompts", "seeds", "sampling", "limits"}   a line {"sample": …} per prompt
    POST /score     {"load", "prompts", "responses"}                     a line {"logps": […]} per response
    POST /holds     {"load", "fingerprint"}                              {"holds": true}

All but the first need the header `Authorization: Bearer TOKEN`; the first is asked before a token or weights are sent,
since anyone on a machine may listen where a worker has ended. What asks the engine is answered by lines of JSON: {"finished": N}
at least once a second, results, and {"done": true}, or {"error", "kind"}. `load` names the weights that are meant:
where others have come since, nothing is sampled. A log-probability that is not finite is null. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import RecipeError
from ..files import open_regular, readable
from ..models.policy import Policy
from .engine import Sample, Sampling
from .sampler import Cut

TOKEN_VARIABLE, URL_VARIABLE, PORT = "SPPO_ROLLOUT_TOKEN", "SPPO_ROLLOUT_URL", 8700
SHORTEST_TOKEN = 16
"""Characters."""
LARGEST_REQUEST = 64 << 20
"""Bytes of a request in JSON, some nine million ids."""
MOST_ROWS, MOST_TOKENS = 1 << 16, 1 << 20
"""Prompts in a request; tokens of a prompt and its response, where neither model nor engine has a limit."""
MOST_STOPS, LONGEST_STOP = 64, 1024
MOST_LISTS = 4 * MOST_ROWS
"""In a request. Python makes ten million of them for half a minute, in which nothing else is answered."""


def proof(token: str, nonce: str) -> str:
    """What only who has the token can say to a nonce: HMAC-SHA256, in hexadecimal digits."""
    return hmac.digest(token.encode(), b"sppo rollout serve " + nonce.encode(), "sha256").hex()


def read_token(path: Path) -> str:
    """The token in a file: its only line. Raises RecipeError for a file that has none, or one that is too short."""
    with readable(f"the token file {path} cannot be read", RecipeError):
        with open_regular(path) as file:
            text = file.read(4097).decode("ascii")
        return checked_token(text.strip(), str(path))


def checked_token(token: str, where: str) -> str:
    """The token, if it is long enough to be one, and can stand in a header. Raises RecipeError."""
    if not SHORTEST_TOKEN <= len(token) <= 4096 or not all(33 <= ord(c) <= 126 for c in token):
        raise RecipeError(
            f"{where} holds no token: {SHORTEST_TOKEN} or more letters, digits and signs without a space; leave it "
            "out of `sppo rollout serve`, and one is made"
        )
    return token


# -- models ------------------------------------------------------------------------------------------------------------


def layout(policy: Policy) -> dict[str, Any]:
    """What two models must have in common for one to sample with the other's trained weights."""
    vocabulary = sorted(policy.tokenizer.get_vocab().items())
    return {
        "weights": [[name, dtype_of(p), list(p.shape)] for name, p in sorted(policy.trained.items())],
        "adapter": None if policy.adapters is None else json.loads(policy.adapters.section.model_dump_json()),
        "frozen": policy.frozen_fingerprint(),
        "vocabulary": policy.vocabulary,
        "eos": list(policy.eos_ids),
        "tokenizer": _digest(vocabulary),
    }


def layout_hash(found: Mapping[str, Any]) -> str:
    """32 hexadecimal digits for a layout."""
    return _digest(found)


def difference(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The first thing in which the layout of the learner (`mine`) and of the server differ, in words; '' if none."""
    own = {name: (dtype, tuple(shape)) for name, dtype, shape in mine["weights"]}
    other = {name: (dtype, tuple(shape)) for name, dtype, shape in theirs["weights"]}
    for name in sorted(own.keys() | other.keys()):
        if name not in other:
            return f"it has no weight {name}, which is trained here"
        if name not in own:
            return f"its weight {name} is not trained here"
        for what, a, b in zip(("dtype", "shape"), own[name], other[name], strict=True):
            if a != b:
                return f"its weight {name} has {what} {b}, and here {a}"
    words = {
        "adapter": "its [adapter] is another one", "frozen": "the weights that are not trained are others",
        "vocabulary": "its vocabulary has another size", "eos": "its responses end at other ids",
        "tokenizer": "its tokenizer has other tokens",
    }  # fmt: skip
    return next((sentence for key, sentence in words.items() if mine[key] != theirs[key]), "")


def dtype_of(tensor: Any) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(tensor.dtype).removeprefix("torch.")


def _digest(tree: Any) -> str:
    return hashlib.blake2b(json.dumps(tree, sort_keys=True).encode(), digest_size=16).hexdigest()


# -- JSON --------------------------------------------------------------------------------------------------------------


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises ValueError for anything else, NaN and Infinity included."""
    if body.count(b"[") + body.count(b"{") > MOST_LISTS:
        raise ValueError(f"the request has more than {MOST_LISTS} lists and objects")
    try:
        tree = json.loads(body, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("the request is nested too deeply") from None
    if not isinstance(tree, dict):
        raise ValueError("the request is no JSON object")
    return tree


def write_line(tree: Mapping[str, Any]) -> bytes:
    """One line of JSON, in ASCII."""
    return json.dumps(tree, allow_nan=False).encode() + b"\n"


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number in JSON")


def finite(values: Iterable[float]) -> list[float | None]:
    """Numbers for JSON: null where one is not finite."""
    return [x if math.isfinite(x) else None for x in values]


def numbers(values: Any, count: int, what: str) -> list[float]:
    """The numbers of a JSON list of this length, NaN for null. Raises ValueError."""
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"{what} is no list of {count} numbers")
    if not all(x is None or type(x) in (int, float) for x in values):
        raise ValueError(f"{what} has an entry that is no number")
    return [math.nan if x is None else float(x) for x in values]


# -- requests ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wanted:
    """What `/generate` asks for."""

    load: str
    prompts: list[list[int]]
    seeds: list[int]
    sampling: Sampling
    limits: list[int] | None


def wanted_to(
    load: str,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    limits: Sequence[int] | None,
) -> dict[str, Any]:
    """The request of `/generate`."""
    return {
        "load": load, "prompts": [list(p) for p in prompts], "seeds": list(seeds), "sampling": asdict(sampling),
        "limits": None if limits is None else list(limits),
    }  # fmt: skip


def wanted_from(tree: Mapping[str, Any], vocabulary: int, context: int) -> Wanted:
    """The same, checked against the model's vocabulary and the most tokens of a sequence. Raises ValueError."""
    only(tree, "load", "prompts", "seeds", "sampling", "limits")
    prompts = rows_from(tree, "prompts", vocabulary)
    sampling = _sampling_from(tree.get("sampling"))
    seeds = _integers(tree.get("seeds"), len(prompts), 0, 2**64 - 1, "seeds")
    limits = tree.get("limits")
    if limits is not None:
        limits = _integers(limits, len(prompts), 1, sampling.max_tokens, "limits")
    for prompt, limit in zip(prompts, limits or [sampling.max_tokens] * len(prompts), strict=True):
        if len(prompt) + limit > context:
            raise ValueError(f"a prompt of {len(prompt)} and a response of {limit} tokens are above {context} tokens")
    if sampling.max_tokens > context:
        raise ValueError(f"sampling.max_tokens is above {context}")
    return Wanted(text_from(tree, "load"), prompts, seeds, sampling, limits)


def only(tree: Mapping[str, Any], *keys: str) -> None:
    """Raises ValueError for a key that is none of these."""
    if unknown := next((key for key in tree if key not in keys), None):
        raise ValueError(f"{unknown[:60]!r} is no key of this request: {', '.join(keys)}")


def text_from(tree: Mapping[str, Any], key: str) -> str:
    """A short text of a request. Raises ValueError."""
    found = tree.get(key)
    if not isinstance(found, str) or len(found) > 256:
        raise ValueError(f"{key} is no text of up to 256 characters")
    return found


def rows_from(tree: Mapping[str, Any], key: str, vocabulary: int) -> list[list[int]]:
    """Rows of ids, none of them empty. Raises ValueError."""
    rows = tree.get(key)
    if not isinstance(rows, list) or not 1 <= len(rows) <= MOST_ROWS:
        raise ValueError(f"{key} is no list of 1 to {MOST_ROWS} lists of ids")
    for row in rows:
        if not isinstance(row, list) or not row:
            raise ValueError(f"{key} has an entry that is no list of ids, or an empty one")
        _integers(row, len(row), 0, vocabulary - 1, key)
    return rows


def whole(value: Any, low: int, high: int, what: str) -> int:
    """A whole number of JSON in these bounds. Raises ValueError."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{what} is no whole number from {low} to {high}")
    return value


def _integers(values: Any, count: int, low: int, high: int, what: str) -> list[int]:
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"{what} is no list of {count} whole numbers")
    if not all(type(x) is int and low <= x <= high for x in values):
        raise ValueError(f"{what} has an entry that is no whole number from {low} to {high}")
    return values


def _real(value: Any, low: float, high: float, what: str) -> float:
    if type(value) not in (int, float) or not low <= value <= high:
        raise ValueError(f"{what} is no number from {low:g} to {high:g}")
    return float(value)


def _sampling_from(tree: Any) -> Sampling:
    if not isinstance(tree, dict) or not isinstance(tree.get("cut"), dict) or not isinstance(tree.get("stop"), list):
        raise ValueError("sampling is no object with max_tokens, temperature, batch, cut and stop")
    only(tree, "max_tokens", "temperature", "batch", "cut", "stop")
    cut, stop = tree["cut"], tree["stop"]
    only(cut, "top_k", "top_p", "min_p")
    if len(stop) > MOST_STOPS or not all(isinstance(s, str) and 0 < len(s) <= LONGEST_STOP for s in stop):
        raise ValueError(f"sampling.stop is no list of up to {MOST_STOPS} texts of up to {LONGEST_STOP} characters")
    for s in stop:
        s.encode()  # half of a surrogate pair is no text
    return Sampling(
        whole(tree.get("max_tokens"), 1, 2**31, "sampling.max_tokens"),
        _real(tree.get("temperature"), 0.0, 1e6, "sampling.temperature"),
        whole(tree.get("batch"), 1, 2**31, "sampling.batch"),
        Cut(
            whole(cut.get("top_k"), 0, 2**31, "sampling.cut.top_k"),
            _real(cut.get("top_p"), 0.0, 1.0, "sampling.cut.top_p"),
            _real(cut.get("min_p"), 0.0, 1.0, "sampling.cut.min_p"),
        ),
        tuple(stop),
    )


# -- answers -----------------------------------------------------------------------------------------------------------


def sample_to(sample: Sample) -> dict[str, Any]:
    """A sample as JSON."""
    return {
        "ids": sample.ids, "logps": finite(sample.logps), "finish": sample.finish, "kept": finite(sample.kept),
        "version": sample.version,
    }  # fmt: skip


def sample_from(tree: Any, vocabulary: int, limit: int) -> Sample:
    """The sample that JSON holds, of up to `limit` tokens. Raises ValueError: a server's answer is checked too."""
    if not isinstance(tree, dict) or tree.get("finish") not in ("stop", "length"):
        raise ValueError("a sample is no object with ids, logps and finish")
    ids = tree.get("ids")
    if not isinstance(ids, list) or not 1 <= len(ids) <= limit:
        raise ValueError(f"a sample is not of 1 to {limit} tokens")
    _integers(ids, len(ids), 0, vocabulary - 1, "ids")
    logps = numbers(tree.get("logps"), len(ids), "logps")
    kept = tree.get("kept")
    kept = numbers(kept, len(ids), "kept") if kept else []
    return Sample(ids, logps, tree["finish"], kept, whole(tree.get("version"), 0, 2**63, "version"))
