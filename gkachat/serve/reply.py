"""The texts that answer one HTTP request, as one object or as a stream of chunks.

reply = Reply(batcher, session, ChatFormat, [ids], max_tokens, body)    # queues the texts
return await reply.response(request)
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from gkachat.inference.chat import ChatSession
from gkachat.inference.engine import TokenOutput
from gkachat.serve.batcher import Answer, Batcher, Deliveries
from gkachat.serve.errors import ApiError, as_api_errors, dumps, error_object, json_response
from gkachat.serve.protocol import ChatFormat, Format, Text, TextRequest


def deliver_on(loop: asyncio.AbstractEventLoop) -> Callable[[Deliveries], None]:
    """Return the function by which the batcher's thread hands outputs to the replies, which live on the loop."""

    def put(deliveries: Deliveries) -> None:
        for answer, outputs in deliveries:
            queue, index = answer.owner
            queue.put_nowait((index, outputs))

    def deliver(deliveries: Deliveries) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(put, deliveries)

    return deliver


class Reply:
    """The n texts of each prompt, from the batcher's queue until they end or the client goes away."""

    def __init__(
        self,
        batcher: Batcher,
        session: ChatSession,
        format: Format,
        prompts: Sequence[list[int]],
        max_tokens: int,
        body: TextRequest,
        left_out: int = 0,
    ):
        """Queue the texts. `left_out`: tokens of the conversation that did not fit. Raises ApiError without room."""
        if (n := len(prompts) * body.n) > batcher.capacity:
            raise ApiError(400, f"given {n} texts at once, expected at most {batcher.capacity}", param="n")
        requests = [session.request(ids, sampling) for ids in prompts for sampling in body.sampling(max_tokens)]
        self.batcher, self.prompts, self.format, self.body = batcher, prompts, format, body
        self.texts = [Text(i, session.engine.tokenizer, format, body) for i in range(n)]
        self.fields = {"id": f"{format.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        self.cut = {"tokens_left_out": left_out} if left_out else {}
        self.prompt_ids = {}
        if body.return_token_ids:
            self.prompt_ids["prompt_token_ids"] = prompts[0] if len(prompts) == 1 else prompts
        self.queue: asyncio.Queue[tuple[int, list[TokenOutput | Exception]]] = asyncio.Queue()
        self.answers = [
            Answer(body.model, one, body.stream, owner=(self.queue, index)) for index, one in enumerate(requests)
        ]
        with as_api_errors():
            batcher.submit(self.answers)

    async def response(self, request: Request) -> Response:
        """Return the response. A client that goes away frees the rows of its texts."""
        if self.body.stream:
            return Stream(self)
        with contextlib.closing(self):
            return await while_connected(request, self.whole())

    async def whole(self) -> Response:
        """Return all texts as one object."""
        async for text, outputs in self.outputs():
            for output in outputs:
                text.add(output)
        fields = self.fields | {"object": self.format.whole, **self.prompt_ids}
        return json_response(fields | {"choices": [text.whole() for text in self.texts], "usage": self.usage()})

    async def chunks(self) -> AsyncIterator[str]:
        """Yield the events of a stream, one for each token."""
        fields = self.fields | {"object": self.format.part}
        if self.format is ChatFormat:
            first = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            choices = [{"index": text.index, **first} for text in self.texts]
            yield event(fields | self.prompt_ids | {"choices": choices})
        try:
            async for text, outputs in self.outputs():
                events = []
                for choice in filter(None, map(text.add, outputs)):
                    usage = {"usage": self.usage()} if self.body.stream_options.continuous_usage_stats else {}
                    events.append(event(fields | {"choices": [choice]} | usage))
                yield "".join(events)
        except ApiError as error:  # the status has been sent
            yield event(error_object(error.status_code, error.detail, error.code))
            return
        if self.body.stream_options.include_usage:
            yield event(fields | {"choices": [], "usage": self.usage()})
        yield "data: [DONE]\n\n"

    async def outputs(self) -> AsyncIterator[tuple[Text, list[TokenOutput]]]:
        """Yield new outputs of one text after another, until all have ended. Raises ApiError if one fails."""
        left = len(self.texts)
        while left:
            index, outputs = await self.queue.get()
            error = outputs.pop() if isinstance(outputs[-1], Exception) else None
            yield self.texts[index], outputs
            if error:
                with as_api_errors():
                    raise error
            left -= bool(outputs[-1].finished)

    def usage(self) -> dict[str, int]:
        """Return the number of tokens so far, and the bytes that they take in the cache."""
        read, written = sum(map(len, self.prompts)), sum(len(text.tokens) for text in self.texts)
        bytes_of = self.batcher.cache(self.body.model).bytes_of
        lengths = (len(self.prompts[text.index // self.body.n]) + len(text.tokens) for text in self.texts)
        counts = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return counts | {"cache_bytes": sum(map(bytes_of, lengths))} | self.cut

    def close(self) -> None:
        """Free the rows of texts that have not ended."""
        self.batcher.cancel(self.answers)


class Stream(StreamingResponse):
    """Server-sent events of a reply, which is closed when the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, reply: Reply):
        super().__init__(reply.chunks(), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.closing(self.reply):
            await super().__call__(scope, receive, send)


def event(value: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {dumps(value)}\n\n"


async def while_connected(request: Request, work: Awaitable[Response]) -> Response:
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
