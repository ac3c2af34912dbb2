"""Read the JSON body of a request, and say what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response

from blip2.errors import InputError
from blip2.io import parse_json
from blip2.serve.errors import ApiError


class JSONRoute(APIRoute):
    """An endpoint that refuses a compressed body, and one in which a key occurs twice, instead of taking the last."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            coding = request.headers.get("content-encoding", "identity")
            if coding.lower() != "identity":
                raise ApiError(
                    415, f"the Content-Encoding of the body is {coding[:40]}, expected none: send it uncompressed"
                )
            return await handler(_Request(request.scope, request.receive))

        return handle


class _Request(Request):
    async def json(self) -> Any:
        try:
            return parse_json(await self.body(), unique_keys=True)
        except InputError as error:
            raise HTTPException(400, f"the body cannot be read ({error}): send a JSON object in UTF-8") from error


def describe_problem(errors: Iterable[Mapping[str, Any]], body: Any) -> tuple[str, str]:
    """Return the field of a body that is wrong, as a path such as ``messages.0.role``, and what is wrong with it.

    Args:
        errors: what pydantic found. A value that may have several types has the errors of each of them: the one that is
            deepest in the body is of the type that the client meant.
        body: the body.
    """
    found = [(_path(error, body), error) for error in errors]
    path, error = max(found, key=lambda each: (len(each[0]), each[1]["type"] not in ("missing", "extra_forbidden")))
    reason = error["msg"].partition(" or instance of ")[0][:300]  # behind it, pydantic names a class of schemas.py
    if error["type"] == "extra_forbidden":
        reason = "there is no such field here: leave it out"
    return ".".join(map(str, path))[:200], reason


def _path(error: Mapping[str, Any], body: Any) -> list[str | int]:
    """Return the place of an error without the types that pydantic names in it, and without its source."""
    source, *names = error["loc"]
    if source != "body":
        return names
    path: list[str | int] = []
    for number, name in enumerate(names, 1):
        is_there = name in body if isinstance(body, dict) else isinstance(body, list) and isinstance(name, int)
        if is_there:
            body = body[name]
        if is_there or (error["type"] == "missing" and number == len(names)):
            path.append(name)
    return path
