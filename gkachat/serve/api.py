"""HTTP interface: OpenAI's models, completions and chat completions, the weights of a token, and the page.

    app = create_app({"d4_gka_chat": ChatSession.from_run("d4_gka_chat")}, batcher)

Errors are OpenAI's error object, with the status that OpenAI gives. docs/server.md describes what is supported.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import re
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gkachat.data.conversations import check_messages
from gkachat.inference import engine
from gkachat.inference.chat import ChatSession
from gkachat.inference.engine import TokenOutput
from gkachat.inspection.statistics import last_token_weights
from gkachat.serve.batcher import Answer, Batcher, Deliveries, QueueFull, Stopping
from gkachat.serve.protocol import (
    ApiError,
    AttentionRequest,
    ChatFormat,
    ChatRequest,
    CompletionFormat,
    CompletionRequest,
    Format,
    Text,
    TextRequest,
    dumps,
    error_object,
    json_response,
    token_text,
)
from gkachat.text import check_text

MAX_BODY = 1 << 20  # bytes
PAGE = Path(__file__).with_name("page.html")


def create_app(
    sessions: Mapping[str, ChatSession], batcher: Batcher, api_key: str | None = None, only_local: bool = False
) -> FastAPI:
    """Return the application. It starts the batcher, and closes it at the end.

    Args:
        sessions: models by name; the batcher has their engines by the same names.
        api_key: key that every request must bear, except for the page itself.
        only_local: answer only requests whose Host is localhost or an address.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher.start(_deliver_on(asyncio.get_running_loop()))
        yield
        await run_in_threadpool(batcher.close)

    # No pages of FastAPI's own: they load scripts from the network.
    app = FastAPI(lifespan=lifespan, openapi_url=None)
    app.add_middleware(Gate, api_key=api_key, only_local=only_local)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(Exception, _on_bug)
    created, page = int(time.time()), PAGE.read_text("utf-8")

    def session_of(name: str) -> ChatSession:
        if name not in sessions:
            known = ", ".join(sessions)
            raise ApiError(404, f"model: given {name!r:.80}, expected {known}", code="model_not_found", param="model")
        return sessions[name]

    def describe(name: str) -> dict[str, Any]:
        config = sessions[name].engine.model.config
        own = {"attention": config.attention, "context": config.sequence_len, "is_tuned": sessions[name].is_tuned}
        return {"id": name, "object": "model", "created": created, "owned_by": "gkachat", **own}

    @app.get("/")
    async def get_page() -> Response:
        return HTMLResponse(page, headers={"Cache-Control": "no-cache"})

    @app.get("/v1/models")
    async def list_models() -> Response:
        return json_response({"object": "list", "data": [describe(name) for name in sessions]})

    @app.get("/v1/models/{name}")
    async def get_model(name: str) -> Response:
        session_of(name)
        return json_response(describe(name))

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        session = session_of(body.model)
        prompts = await run_in_threadpool(completion_prompts, session, body)
        return await answer(session, CompletionFormat, prompts, body.max_tokens, body, request)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        session = session_of(body.model)
        given = [n for n in (body.max_completion_tokens, body.max_tokens) if n is not None]
        max_tokens = given[0] if given else session.engine.model.config.sequence_len
        prompt, left_out = await run_in_threadpool(chat_prompt, session, body, max_tokens)
        return await answer(session, ChatFormat, [prompt], max_tokens, body, request, left_out)

    @app.post("/attention")
    async def attention(body: AttentionRequest) -> Response:
        """Return the weight of each token for the next one, by layer and head."""
        session = session_of(body.model)
        model, tokenizer = session.engine.model, session.engine.tokenizer
        check_ids(session, body.tokens, "tokens")
        with _as_api_errors():
            weights = await asyncio.wrap_future(batcher.call(lambda: last_token_weights(model, body.tokens)))
        rounded = [[[round(w, 4) for w in head] for head in layer] for layer in weights.tolist()]
        return json_response({"tokens": [token_text(tokenizer, id) for id in body.tokens], "weights": rounded})

    async def answer(
        session: ChatSession,
        format: Format,
        prompts: list[list[int]],
        max_tokens: int,
        body: TextRequest,
        request: Request,
        left_out: int = 0,
    ) -> Response:
        """Answer each prompt n times, as one object or as a stream of chunks."""
        samplings = body.sampling(max_tokens)
        requests = [session.request(ids, sampling) for ids in prompts for sampling in samplings]
        answers = Answers(batcher, body.model, requests)
        texts = [Text(i, session.engine.tokenizer, format, body) for i in range(len(requests))]
        fields = {"id": f"{format.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        if body.return_token_ids:
            fields["prompt_token_ids"] = prompts[0] if len(prompts) == 1 else prompts

        def usage() -> dict[str, int]:
            read, written = sum(map(len, prompts)), sum(len(text.tokens) for text in texts)
            bytes_of = batcher.cache(body.model).bytes_of
            cached = (len(prompts[i // body.n]) + len(text.tokens) for i, text in enumerate(texts))
            counts = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
            cut = {"tokens_left_out": left_out} if left_out else {}
            return counts | {"cache_bytes": sum(map(bytes_of, cached))} | cut

        async def chunks() -> AsyncIterator[str]:
            fixed = fields | {"object": format.part}
            if format is ChatFormat:
                first = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
                yield event(fixed | {"choices": [{"index": text.index, **first} for text in texts]})
            fixed.pop("prompt_token_ids", None)
            try:
                async for outputs in answers:
                    events = []
                    for index, output in outputs:
                        if choice := texts[index].add(output):
                            so_far = {"usage": usage()} if body.stream_options.continuous_usage_stats else {}
                            events.append(event(fixed | {"choices": [choice]} | so_far))
                    yield "".join(events)
            except ApiError as error:  # the status has been sent
                yield event(error_object(error.status_code, error.detail, error.code))
                return
            if body.stream_options.include_usage:
                yield event(fixed | {"choices": [], "usage": usage()})
            yield "data: [DONE]\n\n"

        async def whole() -> Response:
            async for outputs in answers:
                for index, output in outputs:
                    texts[index].add(output)
            choices = [text.whole() for text in texts]
            return json_response(fields | {"object": format.whole, "choices": choices, "usage": usage()})

        if body.stream:
            return Stream(answers, chunks())
        with contextlib.closing(answers):
            return await while_connected(request, whole())

    return app


def completion_prompts(session: ChatSession, body: CompletionRequest) -> list[list[int]]:
    """Return the ids of each prompt, BOS first. Raises ApiError."""
    given, tokenizer = body.prompt, session.engine.tokenizer
    prompts = [given] if isinstance(given, str) or not given or isinstance(given[0], int) else given
    all_ids = []
    for prompt in prompts:
        if isinstance(prompt, str):
            prompt = tokenizer.encode(_checked(prompt, "prompt"))
        all_ids.append([tokenizer.bos, *prompt])
        check_ids(session, all_ids[-1], "prompt")
    return all_ids


def chat_prompt(session: ChatSession, body: ChatRequest, max_tokens: int) -> tuple[list[int], int]:
    """Return the ids of a conversation, BOS first, and how many are left out at its beginning. Raises ApiError."""
    for number, message in enumerate(body.messages):
        if unknown := [key for key, value in message.items() if key not in ("role", "content") and value is not None]:
            raise ApiError(400, f"messages, message {number}: {unknown[0]!r:.80} is not supported", param="messages")
    try:
        messages = check_messages(body.messages)
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from None
    for message in messages:
        _checked(message["content"], "messages")
    if messages[-1]["role"] != "user":
        role = messages[-1]["role"]
        raise ApiError(400, f"the last message: given role {role!r}, expected 'user'", param="messages")
    whole = session.encode(messages)
    ids = session.prompt_tokens(messages, max_tokens) if body.truncation == "auto" else whole
    check_ids(session, ids, "messages")
    return ids, len(whole) - len(ids)


def check_ids(session: ChatSession, ids: Sequence[int], param: str) -> None:
    """Raise ApiError for ids that the model does not have, or more of them than its context."""
    context, vocab_size = session.engine.model.config.sequence_len, session.engine.tokenizer.vocab_size
    if len(ids) > context:
        message = f"{param}: given {len(ids):,} tokens, expected at most the model's context of {context:,}"
        raise ApiError(400, message, code="context_length_exceeded", param=param)
    if wrong := [id for id in ids if not 0 <= id < vocab_size]:
        raise ApiError(400, f"{param}: given id {wrong[0]!r:.80}, expected ids from 0 to {vocab_size - 1}", param=param)


def _checked(text: str, param: str) -> str:
    try:
        return check_text(text)
    except ValueError as error:
        raise ApiError(400, f"{param}: {error}", param=param) from None


class Answers:
    """The texts that one HTTP request waits for: an iterator over lists of (index of the text, output)."""

    def __init__(self, batcher: Batcher, run: str, requests: Sequence[engine.Request]):
        """Queue the requests. Raises ApiError if there is no room for them."""
        if len(requests) > batcher.capacity:
            raise ApiError(400, f"given {len(requests)} texts at once, expected at most {batcher.capacity}", param="n")
        self.batcher, self.queue = batcher, asyncio.Queue()
        self.answers = [Answer(run, request, (self.queue, i)) for i, request in enumerate(requests)]
        with _as_api_errors():
            batcher.submit(self.answers)

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, TokenOutput]]]:
        left = len(self.answers)
        while left:
            outputs = [await self.queue.get()]
            outputs += [self.queue.get_nowait() for _ in range(self.queue.qsize())]
            errors = [output for _, output in outputs if isinstance(output, Exception)]
            outputs = [(index, output) for index, output in outputs if output not in errors]
            left -= sum(bool(output.finished) for _, output in outputs)
            yield outputs
            for error in errors:
                with _as_api_errors():
                    raise error

    def close(self) -> None:
        """Free the rows of texts that have not ended."""
        self.batcher.cancel(self.answers)


class Stream(StreamingResponse):
    """Server-sent events of some answers, which are cancelled when the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, answers: Answers, events: AsyncIterator[str]):
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.closing(self.answers):
            await super().__call__(scope, receive, send)


async def while_connected(request: Request, work: Any) -> Response:
    """Return the response, or an empty one as soon as the client has gone away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else Response(status_code=499)
    finally:
        for task in tasks:
            task.cancel()


def event(value: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {dumps(value)}\n\n"


def _deliver_on(loop: asyncio.AbstractEventLoop) -> Any:
    """Return the function by which the batcher's thread hands outputs to the loop, once a step."""

    def put(outputs: Deliveries) -> None:
        for answer, output in outputs:
            queue, index = answer.owner
            queue.put_nowait((index, output))

    def deliver(outputs: Deliveries) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(put, outputs)

    return deliver


@contextlib.contextmanager
def _as_api_errors() -> Any:
    try:
        yield
    except QueueFull as error:
        raise ApiError(429, str(error), code="rate_limit_exceeded") from None
    except Stopping as error:
        raise ApiError(503, str(error), code="server_stopping") from None
    except ApiError:
        raise
    except Exception as error:
        raise ApiError(500, f"the model failed: {type(error).__name__}") from error


# Errors


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
    code, param = getattr(error, "code", None), getattr(error, "param", None)
    headers = {**(error.headers or {}), **({"Retry-After": "1"} if error.status_code in (429, 503) else {})}
    return json_response(error_object(error.status_code, error.detail, code, param), error.status_code, headers)


async def _on_invalid_body(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return json_response(error_object(400, "the body: not JSON, or not complete"), 400)
    path = [str(part) for part in first["loc"][1:]]
    if not path:
        kind = request.headers.get("content-type", "none")
        message = f"the body: expected a JSON object with Content-Type: application/json, given {kind!r:.80}"
        return json_response(error_object(400, message), 400)
    given = "nothing" if first["type"] == "missing" else f"{first['input']!r:.80}"
    message = f"{path[0]}: given {given}: {first['msg']}"
    return json_response(error_object(400, message, param=path[0]), 400)


async def _on_bug(request: Request, error: Exception) -> Response:
    return json_response(error_object(500, "the server failed; its log says why"), 500)
