"""The gate that every request passes before and after its endpoint.

The Host header, the API key and the number of requests are checked in this order; then the size of the body is bounded
while it arrives. Nothing is parsed before. A client that leaves, and a request that takes too long, end the work for
it. Each request is counted and logged, without anything that the client sent.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
import traceback
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blip2.errors import InputError
from blip2.serve.errors import ApiError
from blip2.serve.metrics import Metrics
from blip2.serve.options import ServeOptions

access_log = logging.getLogger("blip2.serve.access")
error_log = logging.getLogger("blip2.serve")

BODY_SECONDS = 30.0
"""Maximum duration of receiving a body, in seconds."""
DISCARD_SECONDS = 2.0
"""Maximum duration of receiving the rest of a body that is refused, in seconds."""
BODIES_IN_MEMORY = 8
"""Maximum size of all bodies in memory, as a multiple of the maximum size of one."""
HOST = re.compile(r"([a-zA-Z0-9._-]+|\[[0-9a-fA-F:.]+\])(?::[0-9]*)?")
"""A Host header: a name or an address, and a port."""
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none';"
    " base-uri 'none'; form-action 'self'",
}
"""Headers of every response that does not set them itself."""


class Gate:
    """An ASGI application around another one; see the description of the module.

    Args:
        app: the application.
        options: the options of the service.
        keys: API keys. Without keys, everybody may use the service.
        metrics: counts the requests.
    """

    def __init__(self, app: ASGIApp, options: ServeOptions, keys: Iterable[str], metrics: Metrics) -> None:
        self._app, self._options, self._metrics = app, options, metrics
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._hosts = read_hosts(options.allowed_hosts)
        self._in_flight = self._num_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await _Request(self, scope, receive, send).run()

    # -- steps of a request, used by _Request ------------------------------------------------------------------------

    def check_host(self, scope: Scope) -> None:
        """Raise an ApiError if the service has allowed names and the Host header is none of them.

        A page of another site can let the name of that site resolve to the address of this server (DNS rebinding), and
        then reads its answers as its own. Its requests have the name of that site.
        """
        if not self._hosts:
            return
        host = host_name(dict(scope["headers"]).get(b"host", b"").decode("latin-1"))
        if not any(host.endswith(each[1:]) if each.startswith("*") else host == each for each in self._hosts):
            raise ApiError(
                400,
                "the Host header is not a name of this server: use one that its --allowed-hosts names",
                code="invalid_host",
            )

    def check_key(self, scope: Scope) -> None:
        """Raise an ApiError if the service needs an API key and the request has no valid one."""
        if not self._keys or not route_path(scope).startswith("/v1/"):
            return
        headers = dict(scope["headers"])
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        found = hashlib.sha256(key.strip()).digest()
        # All keys are compared, so that the time tells nothing.
        matches = [hmac.compare_digest(found, each) for each in self._keys]
        if kind.lower() != b"bearer" or not any(matches):
            raise ApiError(
                401,
                "the API key is missing or wrong: send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def enter(self) -> None:
        """Count a request that will be worked on, or raise an ApiError if there are too many."""
        if self._in_flight >= self._options.max_queue:
            raise _full(f"{self._in_flight} requests are waiting, as many as are allowed")
        self._in_flight += 1
        self._metrics.in_flight.set(self._in_flight)

    def add_bytes(self, number: int) -> None:
        """Count bytes of bodies in memory, or raise an ApiError if there are too many."""
        if number + self._num_bytes > BODIES_IN_MEMORY * self._options.max_body_bytes:
            raise _full(f"the requests that wait have {self._num_bytes:,} bytes, as many as are allowed")
        self._num_bytes += number

    def leave(self, num_bytes: int) -> None:
        """Count a request that is done, and whose body had `num_bytes` bytes."""
        self._num_bytes -= num_bytes
        self._in_flight -= 1
        self._metrics.in_flight.set(self._in_flight)

    async def read_body(self, scope: Scope, receive: Receive, count: Callable[[int], None]) -> bytes:
        """Return the body of a request, or raise an ApiError as soon as it is larger than allowed or takes too long.

        Args:
            scope, receive: of the request.
            count: called with the number of bytes of each part that arrives, before the part is kept.
        """
        limit = self._options.max_body_bytes
        too_large = ApiError(
            413, f"the body is larger than the {limit:,} bytes allowed: send smaller images", code="body_too_large"
        )
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and (len(length) > 18 or int(length) > limit):
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(min(BODY_SECONDS, self._options.deadline)):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientLeft
                    part = message.get("body", b"")
                    if len(body) + len(part) > limit:
                        raise too_large
                    count(len(part))
                    body += part
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time: send it faster", code="body_timeout") from None

    async def discard_body(self, receive: Receive) -> None:
        """Receive the rest of a refused body, because a client that is still sending would not see the answer.

        At most the maximum size of a body is received, for at most :data:`DISCARD_SECONDS`.
        """
        left = self._options.max_body_bytes
        with suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_SECONDS):
                while left >= 0:
                    message = await receive()
                    if not message.get("more_body", False):
                        return
                    left -= len(message.get("body", b""))

    @property
    def app(self) -> ASGIApp:
        """The application behind the gate."""
        return self._app

    @property
    def deadline(self) -> float:
        """Maximum duration of a request in seconds."""
        return self._options.deadline

    @property
    def metrics(self) -> Metrics:
        """The metrics that count requests."""
        return self._metrics


def route_path(scope: Scope) -> str:
    """Return the path of a request relative to the path at which the application is mounted."""
    return scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))


def host_name(header: str) -> str:
    """Return the name or address in a Host header in lower case, without its port; an empty string if it is invalid."""
    match = HOST.fullmatch(header)
    return match[1].lower() if match else ""


def read_hosts(allowed: Iterable[str]) -> list[str]:
    """Return the allowed names of a server in lower case. An empty list: any name.

    Raises:
        InputError: a name has a port or is invalid.
    """
    names: list[str] = []
    for each in allowed:
        prefix = "*." if each.startswith("*.") else ""
        name = host_name(each.removeprefix(prefix))
        if each != "*" and (not name or name != each.removeprefix(prefix).lower()):
            raise InputError(
                f"allowed_hosts contains {each!r}, expected the name of a host such as example.com or *.example.com:"
                " leave out scheme and port"
            )
        names.append(prefix + name)
    return [] if "*" in allowed else names


def _full(found: str) -> ApiError:
    return ApiError(
        429, f"{found}: try again after the time in Retry-After", code="queue_full", headers={"Retry-After": "1"}
    )


class ClientLeft(Exception):  # noqa: N818
    """The client closed its connection before its request was answered."""


class _Request:
    """One request on its way through a gate."""

    def __init__(self, gate: Gate, scope: Scope, receive: Receive, send: Send) -> None:
        self._gate, self._scope, self._receive, self._send = gate, scope, receive, send
        self._id = uuid.uuid4().hex
        self._status: int | None = None
        self._is_complete = self._is_event_stream = self._is_inside = False
        self._num_bytes = 0

    async def run(self) -> None:
        started, outcome = time.monotonic(), "answered"
        try:
            outcome = await self._answer()
        except ClientLeft:
            outcome = "client_left"
        except ApiError as error:  # of the gate itself, before the body has arrived
            await self._gate.discard_body(self._receive)
            await self._fail(error)
        except Exception as error:  # a bug; its message may contain what the client sent, its place does not
            places = [line.strip() for line in traceback.format_tb(error.__traceback__)]
            error_log.error(json.dumps({"event": "error", "id": self._id, "type": type(error).__name__, "at": places}))
            outcome = "error"
            await self._fail(ApiError(500, "an internal error of the server, which it has logged: try again"))
        route = getattr(self._scope.get("route"), "path", "none")
        seconds = time.monotonic() - started
        self._gate.metrics.count_request(route, self._status or 0, outcome, seconds)
        fields = {
            "event": "request",
            "id": self._id,
            "method": self._scope["method"] if self._scope["method"] in ("GET", "POST", "HEAD") else "other",
            "route": route,
            "status": self._status,
            "outcome": outcome,
            "seconds": round(seconds, 4),
            "received_bytes": self._num_bytes,
            **self._scope.get("state", {}).get("log", {}),
        }
        access_log.info(json.dumps(fields))

    async def _answer(self) -> str:
        """Run the application, and return how it ended."""
        gate, scope = self._gate, self._scope
        scope.setdefault("state", {})["log"] = {}
        gate.check_host(scope)
        gate.check_key(scope)
        if scope["method"] in ("GET", "HEAD") and not route_path(scope).startswith("/v1/"):
            await gate.app(scope, self._receive, self._send_with_headers)
            return "answered"
        gate.enter()
        self._is_inside = True
        try:
            return await self._work(await gate.read_body(scope, self._receive, self._count))
        finally:
            self._leave()

    def _count(self, num_bytes: int) -> None:
        self._gate.add_bytes(num_bytes)
        self._num_bytes += num_bytes

    def _leave(self) -> None:
        if self._is_inside:
            self._is_inside = False
            self._gate.leave(self._num_bytes)

    async def _work(self, body: bytes) -> str:
        """Run the application with a body that has arrived, until it ends, the client leaves or the time is over."""
        is_read = False

        async def receive() -> Message:
            nonlocal is_read
            if not is_read:
                is_read = True
                return {"type": "http.request", "body": body, "more_body": False}
            await asyncio.Event().wait()  # the gate itself waits for the client to leave
            raise AssertionError

        work = asyncio.ensure_future(self._gate.app(self._scope, receive, self._send_with_headers))
        left = asyncio.ensure_future(self._disconnected())
        try:
            await asyncio.wait((work, left), timeout=self._gate.deadline, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
                return "answered"
            is_late = not left.done()
        finally:
            for task in (work, left):
                task.cancel()
            await asyncio.gather(work, left, return_exceptions=True)
        if is_late:
            await self._fail(
                ApiError(
                    504,
                    f"the answer was not ready within {self._gate.deadline:g} seconds: ask for fewer tokens, or try"
                    " again later",
                    code="deadline",
                )
            )
            return "deadline"
        raise ClientLeft

    async def _disconnected(self) -> None:
        """Wait until the client leaves before its answer is complete."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if self._is_complete:  # the server says that a client has left after its answer, too
            await asyncio.Event().wait()

    async def _fail(self, error: ApiError) -> None:
        """Send an error: as the response or, if it has begun, as the last event of a stream."""
        if self._status is None:
            await error.response()(self._scope, self._receive, self._send_with_headers)
        elif self._is_event_stream and not self._is_complete:
            event = f"data: {json.dumps(error.body())}\r\n\r\n".encode()
            await self._send_with_headers({"type": "http.response.body", "body": event, "more_body": False})

    async def _send_with_headers(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = list(message.get("headers", []))
            names = {name.lower() for name, _ in headers}
            kind = dict(headers).get(b"content-type", b"")
            self._is_event_stream = kind.startswith(b"text/event-stream")
            more = {**HEADERS, "X-Request-Id": self._id}
            headers += [(k.encode(), v.encode()) for k, v in more.items() if k.lower().encode() not in names]
            message = {**message, "headers": headers}
        elif not message.get("more_body", False):
            self._is_complete = True
            self._leave()  # before the client can send its next request
        await self._send(message)
