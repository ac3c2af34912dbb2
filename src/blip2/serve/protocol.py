"""HTTP/1.1 of uvicorn, with time limits for clients that hold a connection and send or read nothing."""

from __future__ import annotations

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from blip2.serve.errors import ApiError

HEADER_SECONDS = 10.0
"""Maximum duration of receiving the headers of a request, in seconds."""
WRITE_SECONDS = 30.0
"""Maximum duration in which a client reads nothing of an answer, in seconds."""


class HttpProtocol(H11Protocol):
    """Closes connections whose client is too slow, and answers what is not HTTP with an error in OpenAI's shape.

    :class:`blip2.serve.gate.Gate` limits the time for the body of a request.
    """

    _reading: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._writing is None:
            self._writing = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._writing = _cancel(self._writing)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._reading, self._writing = _cancel(self._reading), _cancel(self._writing)

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer has begun
            self.transport.abort()
            return
        error = ApiError(400, "the request is not valid HTTP/1.1: send it with an HTTP client", code="invalid_http")
        body = json.dumps(error.body()).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
        events = (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage())
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()

    def _watch(self) -> None:
        """Start the timer for the headers of a request unless it runs; stop it when they have arrived."""
        if not self._is_idle():
            self._reading = _cancel(self._reading)
        elif self._reading is None:
            self._reading = self.loop.call_later(HEADER_SECONDS, self._stop_waiting)

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _stop_waiting(self) -> None:
        self._reading = None
        if self._is_idle():
            self.transport.abort()


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
