"""The live page: one or several runs in a browser, read from their directories as they grow. It writes nothing and
knows no model.

It answers on loopback only, unless another address is given; then visitors need a token, which is kept in a cookie.
"""

from __future__ import annotations

import gzip
import hmac
import re
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import plotly
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from ..types import OUTCOMES
from . import panels
from .pages import STATIC, environment, rollout_view, script_json
from .reader import RunReader
from .rollouts import ORDERS, Filter
from .summary import summarise

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PAGE = 50
"""Rollouts on a page."""
KINDS = {"app.js": "text/javascript", "style.css": "text/css", "plotly.js": "text/javascript"}
POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; frame-ancestors 'none'; form-action 'self'; base-uri 'none'"
HEALTH_ALERTS = '{% for s in summaries %}{% include "_alerts.html" %}{% endfor %}'
FIELDS: dict[str, Callable[[str], Any]] = {
    "first": int, "last": int, "shortest": int, "longest": int, "lowest": float, "highest": float,
}  # fmt: skip
LABELS = {
    "first": "step from", "last": "step to", "shortest": "tokens from", "longest": "tokens to", "lowest": "advantage from", "highest": "advantage to",
}  # fmt: skip


def plotly_script() -> bytes:
    """Plotly's own bundle, as its package ships it: no network is needed to draw."""
    return (Path(plotly.__file__).parent / "package_data" / "plotly.min.js").read_bytes()


class Site:
    """The pages of some runs."""

    def __init__(self, runs: list[RunReader]) -> None:
        self.runs, self.env = runs, environment()
        self.static = {name: (STATIC / name).read_bytes() for name in ("app.js", "style.css")} | {
            "plotly.js": plotly_script()
        }
        self.packed = {name: gzip.compress(content, 6) for name, content in self.static.items()}

    def routes(self) -> list[Route]:
        """Every address."""
        pages = [("/", self.overview), ("/rollouts", self.rollouts), ("/critic", self.critic), ("/health", self.health)]
        return [
            *(Route(path, page) for path, page in pages),
            Route("/rollouts/{step:int}/{row:int}", self.rollout),
            Route("/rollouts/{step:int}/{row:int}/text", self.text),
            Route("/data/{page}", self.data),
            Route("/static/{name}", self.file),
        ]

    # -- pages -------------------------------------------------------------------------------------------------------

    async def overview(self, request: Request) -> Response:
        """The overview of all runs."""
        return await self._page(request, "overview.html", "overview")

    async def health(self, request: Request) -> Response:
        """The update and the verifier."""
        return await self._page(request, "health.html", "health")

    async def critic(self, request: Request) -> Response:
        """The critic of one run."""
        return await self._page(request, "critic.html", "critic")

    async def rollouts(self, request: Request) -> Response:
        """What the policy wrote, filtered."""
        run = self._run(request)
        want, problem = _filter(request)
        start = _whole(request.query_params.get("start", ""))
        total, rows = await run_in_threadpool(run.rollouts.find, want, start, PAGE)
        kept = {k: v for k, v in request.query_params.items() if v and k != "start"}

        def page(at: int) -> str:
            return "/rollouts?" + urlencode({**kept, "start": at})

        context = {
            "total": total, "rows": rows, "want": want, "problem": problem, "start": start, "outcomes": OUTCOMES, "orders": list(ORDERS),
            "labels": LABELS, "given": kept, "newer": page(max(0, start - PAGE)) if start else None,
            "older": page(start + PAGE) if start + PAGE < total else None, "query": urlencode(kept), "steps": run.rollouts.steps(),
        }  # fmt: skip
        return await self._page(request, "rollouts.html", "rollouts", context)

    async def rollout(self, request: Request) -> Response:
        """One rollout whole."""
        run, (step, row) = self._run(request), (request.path_params["step"], request.path_params["row"])
        found = await run_in_threadpool(run.rollouts.one, step, row)
        if found is None:
            unread = step in run.rollouts.steps() and row < dict(run.rollouts.counts()).get(step, 10**9)
            why = " Its file cannot be read; sppo audit verify says more." if unread else ""
            return self._render(
                request, "missing.html", "rollouts", {"what": f"Step {step} has no rollout {row}.{why}"}, 404
            )
        kept = {k: v for k, v in request.query_params.items() if v}
        before, after = await run_in_threadpool(run.rollouts.beside, step, row)
        context = {
            "r": await run_in_threadpool(rollout_view, run, found),
            "query": urlencode(kept),
            "before": before,
            "after": after,
        }
        return await self._page(request, "rollout.html", "rollouts", context)

    async def text(self, request: Request) -> Response:
        """A response as plain text, to the last character."""
        where = request.path_params["step"], request.path_params["row"]
        found = await run_in_threadpool(self._run(request).rollouts.text, *where)
        return PlainTextResponse(found or "", status_code=404 if found is None else 200)

    async def data(self, request: Request) -> Response:
        """A page's numbers, for its next refresh."""
        page = request.path_params["page"]
        if page not in ("overview", "health", "critic"):
            return JSONResponse({}, status_code=404)
        content = await run_in_threadpool(self._numbers, page, self._run(request))
        content["alerts"] = self.env.from_string(HEALTH_ALERTS).render(content, live=True, **self._links(request))
        content["summary"] = self.env.get_template("_summary.html").render(content, live=True, **self._links(request))
        return Response(
            script_json({k: content[k] for k in ("figures", "summary", "alerts", "running")}),
            media_type="application/json",
        )

    async def file(self, request: Request) -> Response:
        """Style and scripts."""
        name = request.path_params["name"]
        if name not in self.static:
            return Response(status_code=404)
        packed = "gzip" in request.headers.get("accept-encoding", "")
        headers = {"Cache-Control": "max-age=3600", **({"Content-Encoding": "gzip"} if packed else {})}
        return Response((self.packed if packed else self.static)[name], media_type=KINDS[name], headers=headers)

    # -- pieces ------------------------------------------------------------------------------------------------------

    def _run(self, request: Request) -> RunReader:
        return self.runs[min(_whole(request.query_params.get("run", "")), len(self.runs) - 1)]

    def _numbers(self, page: str, run: RunReader) -> dict[str, Any]:
        figures = {
            "overview": lambda: panels.overview(self.runs),
            "health": lambda: panels.health([run]),
            "critic": lambda: panels.critic(run),
        }.get(page, list)()
        shown = self.runs if page == "overview" else [run]
        summaries = [{**summarise(r), "index": self.runs.index(r)} for r in shown]
        return {
            "figures": figures,
            "summaries": summaries,
            "running": any(s["running"] for s in summaries),
            "page": page,
        }

    async def _page(
        self, request: Request, template: str, page: str, context: dict[str, Any] | None = None
    ) -> Response:
        run = self._run(request)
        numbers = await run_in_threadpool(self._numbers, page, run)
        if page == "critic":
            numbers["extremes"] = await run_in_threadpool(panels.extremes, run)
        return self._render(request, template, page, {**numbers, **(context or {})})

    def _links(self, request: Request) -> dict[str, Any]:
        return {"runs": self.runs, "run": self._run(request), "chosen": self.runs.index(self._run(request))}

    def _render(
        self, request: Request, template: str, page: str, context: dict[str, Any], status: int = 200
    ) -> Response:
        html = self.env.get_template(template).render(
            {"summaries": [], "figures": [], "running": False, **context}, page=page, live=True, **self._links(request)
        )
        return HTMLResponse(html, status)


def application(runs: list[RunReader], token: str | None = None, hosts: tuple[str, ...] = LOOPBACK) -> Starlette:
    """The site as an ASGI application; with a token nothing is shown to whoever does not bring it."""
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=[*hosts, "[::1]"] if token is None else ["*"])]
    if token is not None:
        middleware.append(Middleware(_Door, token=token))
    middleware += [Middleware(_Sealed), Middleware(GZipMiddleware, minimum_size=2000)]
    for run in runs:  # so that the first filter finds the index made
        threading.Thread(target=run.rollouts.index, daemon=True).start()
    return Starlette(routes=Site(runs).routes(), middleware=middleware)


class _Sealed(BaseHTTPMiddleware):
    """Headers under which a page loads, sends to and is framed by nothing from other origins."""

    async def dispatch(self, request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response


class _Door(BaseHTTPMiddleware):
    """`?token=…` once, then a cookie that scripts cannot read."""

    def __init__(self, app: Any, token: str) -> None:
        super().__init__(app)
        self.token = token

    async def dispatch(self, request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        shown = request.query_params.get("token")
        if shown is not None and hmac.compare_digest(shown.encode(), self.token.encode()):
            left = urlencode([(k, v) for k, v in request.query_params.multi_items() if k != "token"])
            answer = RedirectResponse(request.url.path + (f"?{left}" if left else ""), 303)
            answer.set_cookie("sppo-token", self.token, httponly=True, samesite="strict")
            return answer
        if not hmac.compare_digest(request.cookies.get("sppo-token", "").encode(), self.token.encode()):
            return PlainTextResponse(
                "This page needs the token that `sppo view` printed: open the address with ?token=… at its end.\n", 401
            )
        return await call_next(request)


def _whole(text: str) -> int:
    """A number of an address, from 0 to a billion; 0 where it is none."""
    return min(int(text), 10**9) if re.fullmatch(r"[0-9]{1,10}", text) else 0


def _filter(request: Request) -> tuple[Filter, str]:
    """The filter of an address, and what of it could not be read, as a sentence."""
    given, problem = dict(request.query_params), ""
    bounds: dict[str, Any] = {}
    for name, kind in FIELDS.items():
        text = given.get(name, "").strip()
        if not text:
            continue
        try:
            bounds[name] = kind(text)
            if not abs(bounds[name]) < 2**31:
                raise ValueError(text)
        except ValueError:
            bounds.pop(name, None)
            problem += f"“{text[:40]}” is not a usable number, so “{LABELS[name]}” is left open. "
    outcome = given.get("outcome", "")
    order = given.get("order", "newest")
    return Filter(
        **bounds, outcome=outcome if outcome in OUTCOMES else "", task=given.get("task", "").strip()[:200],
        surprised="surprised" in given, clipped="clipped" in given, order=order if order in ORDERS else "newest",
    ), problem  # fmt: skip
