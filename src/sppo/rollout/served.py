"""A rollout worker behind HTTP as the engine: `rollout.engine = "served:url=http://127.0.0.1:8700"`, for the server of
`sppo rollout serve` (serve.py; what is sent is in wire.py).

The token comes from the environment variable SPPO_ROLLOUT_TOKEN, or from a file: recipes are shared, secrets are not.
It is sent to nobody who has not shown that they have it too.
The server samples only with the weights that this engine loaded last. Where it has lost them, or does not answer,
WorkerLost says so, and the next `load` begins anew.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import torch

from .. import __version__
from ..errors import OutOfMemory, RecipeError, RunFailure, WorkerLost
from ..models.mlp import ControlPolicy
from ..models.policy import Policy
from ..models.weights import Weights, fingerprint
from ..spec import parse_spec
from .engine import Sample, Sampling
from .link import MEND, Link, Refused, place
from .wire import (
    TOKEN_VARIABLE,
    URL_VARIABLE,
    difference,
    dtype_of,
    layout,
    layout_hash,
    numbers,
    read_token,
    sample_from,
    wanted_to,
    whole,
)

SLICE = 1 << 20
"""Bytes of a tensor that are sent at once: the connection's timeout is for each."""
KINDS: dict[Any, type[Exception]] = {"user": RecipeError, "memory": OutOfMemory, "run": RunFailure}
"""What an error of the server's engine is here; any other means that the worker is lost."""


def build(policy: Policy, *, url: str = "", token_file: str = "", timeout: float = 60.0) -> ServedEngine:
    """The engine over a server, which is asked at once who it is.

    Args:
        url: http://HOST:PORT or https://HOST, as `sppo rollout serve` prints it; default: it is in SPPO_ROLLOUT_URL,
            for a run that may be resumed with a worker at another address. Of the rollout workers of a cluster: a list
            of as many, [http://A:8700, http://B:8700] (see `of_worker`).
        token_file: holds the server's token; default: it is in the environment variable SPPO_ROLLOUT_TOKEN.
        timeout: seconds without a sign of life after which the server is lost. While it works it gives one a second.

    Raises:
        RecipeError: nobody answers there, it refuses the token, or it has another model or version than this process.
    """
    if isinstance(policy, ControlPolicy):
        raise RecipeError("rollout.engine = 'served' samples language models; control tasks need 'control'")
    there = servers(str(url))
    if len(there) != 1:
        raise RecipeError(
            f"rollout.engine: url names {len(there)} servers: several are for the rollout workers of a cluster "
            f"(--cluster.rollouts {len(there)}); leave one"
        )
    where = place(there[0])
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout <= 86400:
        raise RecipeError(f"rollout.engine: served's timeout is in seconds, up to a day, not {timeout}")
    token = read_token(Path(token_file).expanduser()) if token_file else os.environ.get(TOKEN_VARIABLE, "")
    if not token:
        raise RecipeError(
            f"rollout.engine = 'served' needs the token of {where.url}: set {TOKEN_VARIABLE}, or add token_file=FILE"
        )
    engine = ServedEngine(policy, Link(where, token, float(timeout)))
    try:
        engine.meet()
    except WorkerLost as error:
        raise RecipeError(f"rollout.engine: {error}") from error
    return engine


def servers(url: str) -> list[str]:
    """The servers that an option `url`, or SPPO_ROLLOUT_URL, names: one, or those of a list."""
    given = (url or os.environ.get(URL_VARIABLE, "")).strip()
    if given.startswith("["):
        return [one.strip() for one in given.strip("[]").split(",") if one.strip()]
    return [given]


def of_worker(use: str, worker: int, workers: int) -> str:
    """The recipe's `rollout.engine` for one of the workers of a cluster, counted from 0: each has a server of its own. Raises RecipeError where there
    are fewer."""
    spec = parse_spec(use, "sppo.rollout")
    if spec.name != "served":
        return use
    there = servers(str(spec.options.get("url", "")))
    if len(there) < workers:
        raise RecipeError(
            f"rollout.engine names {len(there)} {'server' if len(there) == 1 else 'servers'}, and cluster.rollouts = {workers}: a server "
            "samples for one worker; name as many, url=[http://A:8700, http://B:8700]"
        )
    options = spec.options | {"url": there[worker]}
    return "served:" + ",".join([*spec.words, *(f"{key}={value}" for key, value in options.items())])


class ServedEngine:
    """See `rollout.engine.Engine`."""

    def __init__(self, policy: Policy, link: Link) -> None:
        self.policy, self._link, self.version = policy, link, 0
        self.stated = ""
        self.context: int | None = None
        self._load = ""  # the server's name for the weights that were loaded last; empty: none, or not whole
        self._layout = layout(policy)

    def meet(self) -> None:
        """Ask who the server is. Raises RecipeError where it cannot sample for this policy, WorkerLost where it does not
        answer."""
        url, health = self._link.url, self._tree("GET", "/health")
        try:
            version, hashed, context = health["sppo"], health["layout"], health["context"]
            engine, stated, theirs, model = (str(health[key]) for key in ("engine", "stated", "torch", "model"))
        except KeyError:
            raise self._lost("it answers, but not as sppo rollout serve does") from None
        if version != __version__:
            raise RecipeError(f"rollout.engine: {url} runs sppo {version}, and this is {__version__}; install the same")
        if hashed != layout_hash(self._layout):
            raise RecipeError(self._other_model(model))
        self.context = self._read(whole, context, 1, 2**40, "context")
        how = f"; {stated.removeprefix('engine ')}" if stated else ""
        other = f" (torch {theirs} there, {torch.__version__} here: last bits may differ)"
        self.stated = f"engine served: {engine} at {url}{how}{other if theirs != torch.__version__ else ''}"

    def _other_model(self, model: str) -> str:
        with contextlib.suppress(KeyError, TypeError, ValueError):
            why = difference(self._layout, self._tree("GET", "/layout"))
            return (
                f"rollout.engine: {self._link.url} has another model ({model}): {why}; start it with the recipe of "
                "this run, or the same --model and --policy.dtype"
            )
        return f"rollout.engine: {self._link.url} has another model ({model}), and does not say which"

    # -- weights -------------------------------------------------------------------------------------------------------

    def load(self, weights: Weights, version: int) -> None:
        """Send weights, one tensor at a time. Raises WorkerLost where they do not arrive whole; nothing is sampled then
        until a whole load."""
        self._load = ""
        hashed = layout_hash(self._layout)
        with self._link.kept():
            begun = self._tree("POST", "/load", {"version": version, "layout": hashed}).get("load")
            for name, tensor in weights:
                self._send(str(begun), name, tensor)
            for _ in self._lines("/loaded", {"load": begun}):
                pass
        self.version, self._load = version, str(begun)

    def _send(self, load: str, name: str, tensor: torch.Tensor) -> None:
        flat = tensor.detach().contiguous().cpu().reshape(-1)
        shape = ",".join(map(str, tensor.shape))
        given = {"load": load, "name": name, "dtype": dtype_of(tensor), "shape": shape}
        query = urlencode(given | {"fingerprint": fingerprint([(name, tensor)])})
        content = flat.view(torch.uint8).numpy().data
        parts = (content[at : at + SLICE] for at in range(0, len(content), SLICE))
        for _ in self._lines(f"/weight?{query}", parts=parts, size=len(content), what=f"weight {name}"):
            pass

    def holds(self, fingerprint: str) -> bool:
        """Whether the server's engine has these weights, as it finds them where they are."""
        asked = {"load": self._loaded(), "fingerprint": fingerprint}
        return [line["holds"] for line in self._lines("/holds", asked) if "holds" in line] == [True]

    def _loaded(self) -> str:
        """The name of this engine's weights at the server; those of the policy are sent where there were none yet."""
        if not self._load:
            self.load(self.policy.weights(), self.version)
        return self._load

    # -- sampling ------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        progress: Callable[[int], None] | None = None,
        limits: Sequence[int] | None = None,
    ) -> list[Sample]:
        """See the protocol: as the server's engine samples. Raises WorkerLost where it does not answer, or holds other
        weights than these."""
        if any(len(p) == 0 for p in prompts):
            raise ValueError("a prompt has no tokens")
        if not prompts:
            return []
        samples: list[Sample] = []
        most, told = limits or [sampling.max_tokens] * len(prompts), 0
        asked = wanted_to(self._loaded(), prompts, seeds, sampling, limits)
        with contextlib.closing(
            self._lines("/generate", asked)
        ) as lines:  # else a `progress` that raises keeps it open
            for line in lines:
                if "sample" in line and len(samples) < len(prompts):
                    samples.append(self._read(sample_from, line["sample"], self.policy.vocabulary, most[len(samples)]))
                elif progress is not None and isinstance(line.get("finished"), int) and line["finished"] > told:
                    told = min(line["finished"], len(prompts))
                    progress(told)
        if len(samples) != len(prompts):
            raise self._lost(f"it sent {len(samples)} samples for {len(prompts)} prompts")
        if progress is not None and told < len(prompts):
            progress(len(prompts))
        return samples

    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[float]]:
        """See the protocol."""
        if not prompts:
            return []
        rows = {"prompts": [list(p) for p in prompts], "responses": [list(r) for r in responses]}
        lines = [line["logps"] for line in self._lines("/score", {"load": self._loaded()} | rows) if "logps" in line]
        if len(lines) != len(responses):
            raise self._lost(f"it scored {len(lines)} of {len(responses)} responses")
        return [self._read(numbers, row, len(r), "logps") for row, r in zip(lines, responses, strict=True)]

    def close(self) -> None:
        """Close the connection; the server goes on, and keeps its weights."""
        self._link.close()

    # -- talking -------------------------------------------------------------------------------------------------------

    def _tree(self, method: str, path: str, tree: dict[str, Any] | None = None) -> dict[str, Any]:
        """The one object of an answer."""
        with self._meaning(path):
            objects = list(self._link.ask(method, path, tree))
        return objects[0] if objects else {}

    def _lines(
        self,
        path: str,
        tree: dict[str, Any] | None = None,
        *,
        parts: Iterator[memoryview] | None = None,
        size: int = 0,
        what: str = "",
    ) -> Generator[dict[str, Any], None, None]:
        """The lines of an answer of the server's engine, until the one that says that it is done. Raises what an error
        there means here."""
        done = False
        with self._meaning(what or path):
            for line in self._link.ask("POST", path, tree, parts=parts, size=size):
                if "error" in line:
                    raise self._error(line)
                done = line.get("done") is True
                yield line
        if not done:
            raise self._lost("its answer broke off")

    def _error(self, line: dict[str, Any]) -> Exception:
        kind = KINDS.get(line.get("kind"))
        if kind is None:
            return self._lost(str(line["error"]))
        return kind(f"rollout worker {self._link.url}: {line['error']}")

    @contextlib.contextmanager
    def _meaning(self, what: str) -> Iterator[None]:
        """Turn a refusal of the server's into an error of ours."""
        try:
            yield
        except Refused as refusal:
            if refusal.status == 401:
                why = "it has another token than this process, or is no worker of yours"
                mend = f"set {TOKEN_VARIABLE} (or token_file) to the token that it was started with"
                raise self._lost(why, mend) from None
            if refusal.status == 413:
                raise RunFailure(f"rollout worker {self._link.url}: {refusal}; sample fewer prompts at once") from None
            raise self._lost(f"{what.partition('?')[0].lstrip('/')}: {refusal}") from None

    def _read(self, reader: Callable[..., Any], *given: Any) -> Any:
        try:
            return reader(*given)
        except ValueError as error:
            raise self._lost(f"its answer cannot be used: {error}") from None

    def _lost(self, why: str, mend: str = MEND) -> WorkerLost:
        self._load = ""
        return self._link.lost(why, mend)
