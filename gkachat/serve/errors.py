"""Errors as OpenAI's error object, with the status that OpenAI gives."""

import contextlib
import hmac
import ipaddress
import json
import re
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gkachat.serve.batcher import QueueFull, Stopping

MAX_BODY = 1 << 20  # bytes

# JSON in ASCII, so that half of a surrogate pair, which a request can spell, can be written too.
dumps = json.JSONEncoder(separators=(",", ":")).encode


class ApiError(HTTPException):
    """Error that a client gets as OpenAI's error object."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None):
        super().__init__(status, message)
        self.code, self.param = code, param


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dumps(value), status, headers, media_type="application/json")


def error_object(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Return OpenAI's error object."""
    kind = {429: "rate_limit_error"}.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


@contextlib.contextmanager
def as_api_errors() -> Iterator[None]:
    """Raise what the batcher or a model raises as an ApiError."""
    try:
        yield
    except QueueFull as error:
        raise ApiError(429, str(error), code="rate_limit_exceeded") from None
    except Stopping as error:
        raise ApiError(503, str(error), code="server_stopping") from None
    except Exception as error:
        raise ApiError(500, f"the model failed: {type(error).__name__}") from error


def add_errors(app: FastAPI, api_key: str | None, only_local: bool) -> None:
    """Make an application answer all errors as OpenAI does, and refuse requests as `Gate` does."""
    app.add_middleware(Gate, api_key=api_key, only_local=only_local)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(Exception, _on_bug)


class Gate:
    """Middleware that refuses, before they are read, bodies that are too large, and requests without the key.

    With `only_local` it refuses requests for other hosts too. A page of any site can have its own name point to
    127.0.0.1; the browser then lets it read what the server answers (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, api_key: str | None, only_local: bool):
        self.app, self.expected = app, None if api_key is None else f"Bearer {api_key}".encode()
        self.only_local = only_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, n_bytes = dict(scope["headers"]), 0
        host = headers.get(b"host", b"localhost").decode("latin-1")
        if self.only_local and not is_local(host):
            message = f"Host: given {host!r:.80}, expected localhost or an address; a proxy needs an --api-key"
            await json_response(error_object(403, message, "wrong_host"), 403)(scope, receive, send)
            return
        key = headers.get(b"authorization", b"")
        if self.expected and scope["path"] != "/" and not hmac.compare_digest(key, self.expected):
            message = "given no valid API key, expected Authorization: Bearer KEY"
            await json_response(error_object(401, message, "invalid_api_key"), 401)(scope, receive, send)
            return

        async def limited() -> Message:
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if n_bytes > MAX_BODY:
                raise ApiError(400, f"the body: expected at most {MAX_BODY:,} bytes", code="body_too_large")
            return message

        await self.app(scope, limited, send)


def is_local(host: str) -> bool:
    """Return whether a Host header is localhost or an IP address, with or without a port."""
    name = host.rpartition(":")[0] if re.search(r":\d*$", host) else host
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name.removeprefix("[").removesuffix("]")))
    return name.lower() == "localhost"


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    status, detail = error.status_code, error.detail
    if error.__cause__ and not isinstance(error, ApiError):  # FastAPI could not decode the body
        detail = f"the body: cannot be read as JSON: {error.__cause__!s:.200}"
    code, param = getattr(error, "code", None), getattr(error, "param", None)
    headers = {**(error.headers or {}), **({"Retry-After": "1"} if status in (429, 503) else {})}
    return json_response(error_object(status, detail, code, param), status, headers)


async def _on_invalid_body(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return json_response(error_object(400, "the body: not JSON, or not complete"), 400)
    path = [str(part) for part in first["loc"][1:]]
    if not path:
        kind = request.headers.get("content-type", "none")
        message = f"the body: expected a JSON object with Content-Type: application/json, given type {kind!r:.80}"
        return json_response(error_object(400, message), 400)
    given = "nothing" if first["type"] == "missing" else f"{first['input']!r:.80}"
    expected = [e["msg"] for e in error.errors() if e["loc"][:2] == first["loc"][:2]]  # one for each type of a union
    message = f"{path[0]}: given {given}: {', or: '.join(dict.fromkeys(expected))}"
    return json_response(error_object(400, message, param=path[0]), 400)


async def _on_bug(request: Request, error: Exception) -> Response:
    return json_response(error_object(500, "the server failed; its log says why"), 500)
