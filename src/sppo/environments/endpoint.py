"""OpenAI's protocol on loopback, for agents that know nothing of training: chat completions, tools and streaming, one session a trajectory.

A session's address is its own (`base_url`), and the token is the process's (`api_key`). A request is what the policy reads next; what it writes is
the answer. `n` is 1, sampling is the recipe's, whatever a request asks for.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import queue
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ..connections import Refusal, authorised, http_server, listening, plain
from ..types import Message
from .base import Call, Reply

MOST_BYTES = 16 << 20
"""Of a request."""
Asked = dict[str, Any]


@dataclass
class Ended:
    """The agent is done; what it returned, or what it raised."""

    result: Any = None
    error: BaseException | None = None


class Session:
    """One agent's conversation with the policy. `ask` is awaited in the server's loop; the other methods may be called in any thread."""

    def __init__(self, base_url: str, api_key: str, name: str) -> None:
        self.base_url, self.api_key, self.name = base_url, api_key, name
        self._asked: queue.SimpleQueue[Asked | Ended] = queue.SimpleQueue()
        self._waiting: asyncio.Future[Message | None] | None = None
        self._over = False

    async def ask(self, body: Asked) -> Message:
        """Put a request to the policy, and wait for its answer. Raises Refusal."""
        if self._over:
            raise Refusal(410, "the trajectory is over")
        if self._waiting is not None:
            raise Refusal(409, "one request at a time: a trajectory is one conversation")
        self._waiting = asyncio.get_running_loop().create_future()
        try:
            self._asked.put(body)
            answer = await self._waiting
        finally:
            self._waiting = None
        if answer is None:
            raise Refusal(410, "the trajectory is over")
        return answer

    def end(self, ended: Ended) -> None:
        """The agent returned or raised."""
        self._asked.put(ended)

    def next(self) -> Asked | Ended:
        """What comes from the agent next."""
        return self._asked.get()

    def answer(self, message: Message | None) -> None:
        """Answer the request that waits, if one does."""
        if (waiting := self._waiting) is not None:
            waiting.get_loop().call_soon_threadsafe(_settle, waiting, message)

    def close(self) -> None:
        """Whatever the agent still asks is refused, and nobody waits for it."""
        self._over = True
        self.answer(None)
        self._asked.put(Ended(error=TimeoutError("the trajectory is over")))


def _settle(waiting: asyncio.Future[Message | None], message: Message | None) -> None:
    if not waiting.done():
        waiting.set_result(message)


class Endpoint:
    """The server of this process."""

    def __init__(self) -> None:
        self.token = secrets.token_urlsafe(24)
        self._socket = listening("127.0.0.1", 0)
        self.port = self._socket.getsockname()[1]
        self._sessions: dict[str, Session] = {}
        self._server = http_server(self._application, self.token, 120)
        threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="sppo-endpoint", daemon=True
        ).start()

    def open(self) -> Session:
        """A new session."""
        name = secrets.token_hex(8)
        made = Session(f"http://127.0.0.1:{self.port}/{name}/v1", self.token, name)
        self._sessions[name] = made
        return made

    def close(self, session: Session) -> None:
        """End a session."""
        session.close()
        self._sessions.pop(session.name, None)

    async def _application(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            plain(request)
            if not authorised(scope["headers"], self.token):
                raise Refusal(401, "the api_key is not this session's")
            response = await self._answer(request)
        except Refusal as refusal:
            told = {"message": str(refusal), "type": "invalid_request_error", "code": refusal.status}
            response = JSONResponse({"error": told}, refusal.status)
        with contextlib.suppress(OSError):  # the client has left
            await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        name, _, route = request.scope["path"].strip("/").partition("/")
        session = self._sessions.get(name)
        if session is None:
            raise Refusal(404, "there is no such session, or its trajectory is over")
        if (request.method, route) == ("GET", "v1/models"):
            return JSONResponse(
                {"object": "list", "data": [{"id": "policy", "object": "model", "created": 0, "owned_by": "sppo"}]}
            )
        if (request.method, route) != ("POST", "v1/chat/completions"):
            raise Refusal(404, "POST /v1/chat/completions or GET /v1/models")
        if int(request.headers.get("content-length", "0")) > MOST_BYTES:
            raise Refusal(413, f"a request may have {MOST_BYTES} bytes")
        body = request_of(await request.body())
        message = await session.ask(body)
        answer = functools.partial(completion, str(body.get("model", "policy")), message)
        if body.get("stream"):
            return Response(streamed(answer), media_type="text/event-stream")
        return JSONResponse(answer())


@functools.cache
def endpoint() -> Endpoint:
    """The server of this process, which starts when it is first asked for."""
    return Endpoint()


def request_of(body: bytes) -> Asked:
    """A request's body, its messages in one form. Raises Refusal."""
    try:
        tree = json.loads(body)
        if not isinstance(tree, dict) or not isinstance(tree.get("messages"), list) or not tree["messages"]:
            raise ValueError("`messages` is missing")
        if tree.get("n", 1) not in (1, None):
            raise ValueError("n must be 1")
        tree["messages"] = messages_of(tree["messages"])
        return tree
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Refusal(400, f"this is no request for a chat completion: {str(error)[:200]}") from None


def messages_of(given: Sequence[Any]) -> list[Message]:
    """Messages in the one form that is compared and rendered: text for content, arguments as objects, results by the name of their tool."""
    out, names = list[Message](), dict[str, str]()
    for m in given:
        role = "system" if m["role"] == "developer" else str(m["role"])
        message: Message = {"role": role, "content": _text(m.get("content"))}
        if calls := m.get("tool_calls"):
            message["tool_calls"] = [
                {
                    "type": "function",
                    "function": {"name": c["function"]["name"], "arguments": _object(c["function"]["arguments"])},
                }
                for c in calls
            ]
            names |= {c["id"]: c["function"]["name"] for c in calls if "id" in c}
        if role == "tool":
            message["name"] = names.get(m.get("tool_call_id", ""), m.get("name") or "")
        out.append(message)
    return out


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if any(part["type"] != "text" for part in content):
        raise ValueError("only text can be read")
    return "".join(part["text"] for part in content)


def _object(arguments: Any) -> Any:
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def message_of(reply: Reply, number: int) -> Message:
    """A turn of the policy as an answer; what it called badly is said in its text."""
    good = [c for c in reply.calls if not c.error]
    content = "\n".join([reply.text, *(f"[{c.error}]" for c in reply.calls if c.error)]).strip()
    message: Message = {"role": "assistant", "content": content or (None if good else "")}
    if good:
        message["tool_calls"] = [_call(c, f"call_{number}_{i}") for i, c in enumerate(good)]
    return message


def _call(call: Call, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "type": "function",
        "function": {"name": call.name, "arguments": json.dumps(dict(call.arguments), ensure_ascii=False)},
    }


def completion(model: str, message: Message, chunk: bool = False) -> dict[str, Any]:
    """The whole answer, or its one chunk."""
    finish = "tool_calls" if message.get("tool_calls") else "stop"
    calls = [{"index": i, **c} for i, c in enumerate(message.get("tool_calls", []))]
    said = message | ({"tool_calls": calls} if calls and chunk else {})
    return {
        "id": f"chatcmpl-{secrets.token_hex(8)}", "object": f"chat.completion{'.chunk' if chunk else ''}", "created": int(time.time()),
        "model": model, "choices": [{"index": 0, "delta" if chunk else "message": said, "finish_reason": finish, "logprobs": None}],
    }  # fmt: skip


def streamed(answer: Any) -> str:
    """The answer as server-sent events: the policy's turn is known as a whole only."""
    return f"data: {json.dumps(answer(chunk=True))}\n\ndata: [DONE]\n\n"
