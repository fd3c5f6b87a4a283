"""HTTP interface: OpenAI's models, completions and chat completions, the weights of a token, and the page.

    app = create_app({"d4_gka_chat": ChatSession.from_run("d4_gka_chat")}, batcher)

docs/server.md describes what is supported.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse, Response
from starlette.concurrency import run_in_threadpool

from gkachat.data.conversations import check_messages
from gkachat.inference.chat import ChatSession
from gkachat.inspection.statistics import last_token_weights
from gkachat.serve.batcher import Batcher
from gkachat.serve.errors import ApiError, add_errors, as_api_errors, json_response
from gkachat.serve.protocol import (
    AttentionRequest,
    ChatFormat,
    ChatRequest,
    CompletionFormat,
    CompletionRequest,
    token_text,
)
from gkachat.serve.reply import Reply, deliver_on
from gkachat.text import check_text

PAGE = Path(__file__).with_name("page.html")
READ = ["GET", "HEAD"]

router = APIRouter()


@dataclass(frozen=True)
class Models:
    """Models by name, and the batcher with their engines. Handlers find it in `request.app.state.models`."""

    sessions: Mapping[str, ChatSession]
    batcher: Batcher
    created: int
    """Seconds since 1970."""

    def session(self, name: str) -> ChatSession:
        """Return the session of a model. Raises ApiError."""
        if name not in self.sessions:
            message = f"model: given {name!r:.80}, expected {', '.join(self.sessions)}"
            raise ApiError(404, message, code="model_not_found", param="model")
        return self.sessions[name]

    def describe(self, name: str) -> dict[str, Any]:
        session = self.session(name)
        config = session.engine.model.config
        own = {"attention": config.attention, "context": config.sequence_len, "is_tuned": session.is_tuned}
        return {"id": name, "object": "model", "created": self.created, "owned_by": "gkachat", **own}


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
        batcher.start(deliver_on(asyncio.get_running_loop()))
        yield
        await run_in_threadpool(batcher.close)

    # No pages of FastAPI's own: they load scripts from the network.
    app = FastAPI(lifespan=lifespan, openapi_url=None)
    app.state.models = Models(sessions, batcher, int(time.time()))
    app.include_router(router)
    add_errors(app, api_key, only_local)
    return app


@router.api_route("/", methods=READ)
async def get_page() -> Response:
    return HTMLResponse(PAGE.read_text("utf-8"), headers={"Cache-Control": "no-cache"})


@router.api_route("/v1/models", methods=READ)
async def list_models(request: Request) -> Response:
    models = request.app.state.models
    return json_response({"object": "list", "data": [models.describe(name) for name in models.sessions]})


@router.api_route("/v1/models/{name}", methods=READ)
async def get_model(name: str, request: Request) -> Response:
    return json_response(request.app.state.models.describe(name))


@router.post("/v1/completions")
async def complete(body: CompletionRequest, request: Request) -> Response:
    models = request.app.state.models
    session = models.session(body.model)
    prompts = await run_in_threadpool(completion_prompts, session, body)
    return await Reply(models.batcher, session, CompletionFormat, prompts, body.max_tokens, body).response(request)


@router.post("/v1/chat/completions")
async def chat(body: ChatRequest, request: Request) -> Response:
    models = request.app.state.models
    session = models.session(body.model)
    given = [n for n in (body.max_completion_tokens, body.max_tokens) if n is not None]
    max_tokens = given[0] if given else session.engine.model.config.sequence_len
    prompt, left_out = await run_in_threadpool(chat_prompt, session, body, max_tokens)
    return await Reply(models.batcher, session, ChatFormat, [prompt], max_tokens, body, left_out).response(request)


@router.post("/attention")
async def attention(body: AttentionRequest, request: Request) -> Response:
    """Return the weight of each token for the next one, by layer and head."""
    models = request.app.state.models
    session = models.session(body.model)
    model, tokenizer = session.engine.model, session.engine.tokenizer
    check_ids(session, body.tokens, "tokens")
    with as_api_errors():
        weights = await asyncio.wrap_future(models.batcher.call(lambda: last_token_weights(model, body.tokens)))
    rounded = [[[round(w, 4) for w in head] for head in layer] for layer in weights.tolist()]
    return json_response({"tokens": [token_text(tokenizer, id) for id in body.tokens], "weights": rounded})


def completion_prompts(session: ChatSession, body: CompletionRequest) -> list[list[int]]:
    """Return the ids of each prompt, BOS first. Raises ApiError."""
    given, tokenizer = body.prompt, session.engine.tokenizer
    prompts = [given] if isinstance(given, str) or not given or isinstance(given[0], int) else given
    try:
        texts_as_ids = [tokenizer.encode(check_text(p)) if isinstance(p, str) else p for p in prompts]
    except ValueError as error:
        raise ApiError(400, f"prompt: {error}", param="prompt") from None
    all_ids = [[tokenizer.bos, *ids] for ids in texts_as_ids]
    for ids in all_ids:
        check_ids(session, ids, "prompt")
    return all_ids


def chat_prompt(session: ChatSession, body: ChatRequest, max_tokens: int) -> tuple[list[int], int]:
    """Return the ids of a conversation, BOS first, and how many are left out at its beginning. Raises ApiError."""
    for number, message in enumerate(body.messages):
        if unknown := [key for key, value in message.items() if key not in ("role", "content") and value is not None]:
            raise ApiError(400, f"messages, message {number}: {unknown[0]!r:.80} is not supported", param="messages")
    try:
        messages = check_messages(body.messages)
        for message in messages:
            check_text(message["content"])
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from None
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
