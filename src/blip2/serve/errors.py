"""Errors of requests in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from starlette.responses import JSONResponse

from blip2.errors import escape_control_characters

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
"""The type of an error by its status. Others are ``invalid_request_error``, and from 500 on ``server_error``."""


class ApiError(Exception):
    """An error that is sent to the client.

    Args:
        status: status of the response.
        message: one line: what was found, what was expected and what to do. It contains nothing of the server.
        param: the field of the request that is wrong.
        code: a name of the error for programs.
        headers: more headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, dict[str, str | None]]:
        """Return the error in OpenAI's shape."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        # Keys and texts of the request, which can contain any character, even one that cannot be encoded.
        message, param = escape_control_characters(self.message), self.param and escape_control_characters(self.param)
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the response to the request."""
        return JSONResponse(self.body(), self.status, self.headers)
