"""OpenAI's endpoints, and those of kept memories, over HTTP."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from itertools import groupby
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.sse import EventSourceResponse, format_sse_event
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from mosaics.memories.contract import nearest
from mosaics.serving.answer import Logprob, Piece, Sampling
from mosaics.serving.desk import Desk, Prompt, Refused, Ticket, memory_bytes
from mosaics.serving.memories import Kept
from mosaics.serving.requests import ChatRequest, CompletionRequest, MemoryRequest, Message, Part, StreamOptions

_BODIES = (CompletionRequest, ChatRequest, MemoryRequest)
_FIELDS = {name for body in (*_BODIES, StreamOptions, Message, Part) for name in body.model_fields}
BODY_SECONDS = 30.0  # for a request to arrive
LOCAL = ("localhost", "127.0.0.1", "::1")


def build_app(desk: Desk, hosts: Sequence[str] | None = LOCAL, key: str | None = None) -> FastAPI:
    """The endpoints.

    Args:
        desk: the model and what its clients share.
        hosts: names by which the server may be asked, so that no web page reaches it by a name of its own; None: any.
        key: what clients have to send as `Authorization: Bearer`; None: nothing.
    """

    async def allowed(request: Request) -> None:
        host = request.headers.get("host", "").rsplit(":", 1)[0].strip("[]")
        if hosts is not None and host not in hosts:
            raise Refused(403, "this server is asked by another name than its own; give --host the one it should have")
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if key is not None and request.url.path != "/health" and not secrets.compare_digest(given, key.encode()):
            raise Refused(401, "the API key is missing or wrong", "invalid_api_key")

    async def opened() -> AsyncIterator[Ticket]:
        ticket = Ticket(desk)
        try:
            yield ticket
        finally:
            ticket.close()

    Open = Annotated[Ticket, Depends(opened)]
    app = FastAPI(title="mosaics", openapi_url=None, dependencies=[Depends(allowed)])
    app.add_middleware(_Arriving, limit=desk.limits.body, seconds=BODY_SECONDS)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return JSONResponse({"error": error.error}, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return await refused(request, _invalid(error.errors()))

    @app.exception_handler(HTTPException)
    async def failed(request: Request, error: HTTPException) -> JSONResponse:
        said = {404: "there is no such path", 405: "the path does not take this method"}
        response = await refused(request, Refused(error.status_code, said.get(error.status_code, str(error.detail))))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        return await refused(request, Refused(500, "the server failed; its log says more"))

    @app.get("/health")
    async def health() -> JSONResponse:
        status = "shutting down" if desk.engine.closing else "ok" if desk.engine.alive else "failed"
        about = {"status": status, "answers": desk.open, "memories": len(desk.memories)}
        return JSONResponse(about, 200 if status == "ok" else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(desk)]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        _check_model(desk, model)
        return _model(desk)

    @app.post("/v1/completions")
    async def completions(asked: CompletionRequest, request: Request, ticket: Open) -> Response:
        _check_model(desk, asked.model)
        memory = desk.memory(asked.memory)
        prompts = []
        for given in _split(asked.prompt):
            ids = await desk.tokens(given, special=memory is None) if isinstance(given, str) else given
            if ids and not 0 <= min(ids) <= max(ids) < desk.model.config.vocab_size:
                raise Refused(400, f"tokens are from 0 to {desk.model.config.vocab_size - 1}", param="prompt")
            prompts.append(Prompt(ids, memory))
        samplings = _samplings(desk, asked, prompts, asked.max_tokens or 16, asked.logprobs)
        return await _answer(_Completion(desk, prompts), asked, request, ticket, samplings)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request, ticket: Open) -> Response:
        _check_model(desk, asked.model)
        if asked.top_logprobs is not None and not asked.logprobs:
            raise Refused(400, "top_logprobs needs logprobs", param="top_logprobs")
        memory = desk.memory(asked.memory)
        messages = [{"role": m.role, "content": _text(m.content)} for m in asked.messages]
        prompts = [Prompt(await desk.conversation(messages, first=memory is None), memory)]
        tokens = asked.max_completion_tokens or asked.max_tokens
        tokens = tokens or max(1, min(desk.limits.tokens, desk.limits.context - prompts[0].tokens))
        samplings = _samplings(desk, asked, prompts, tokens, (asked.top_logprobs or 0) if asked.logprobs else None)
        return await _answer(_Chat(desk, prompts), asked, request, ticket, samplings)

    @app.post("/v1/memories")
    async def read(asked: MemoryRequest, request: Request, ticket: Open) -> Response:
        if asked.model is not None:
            _check_model(desk, asked.model)
        before = desk.memory(asked.memory)
        prompt = Prompt(await desk.tokens(asked.text, special=before is None), before)
        desk.check_length(prompt)
        room = desk.memories.room()
        if memory_bytes(desk.model, prompt.tokens) > room:
            said = f"a memory of {prompt.tokens} tokens does not fit in {max(room, 0):,} bytes"
            raise Refused(413, said, param="text")

        async def keep() -> Response:
            kept = await ticket.read(prompt)
            try:
                desk.memories.add(kept)
            except ValueError as error:
                raise Refused(413, str(error), param="text") from None
            return JSONResponse(_memory(kept))

        return await _unless_gone(request, keep())

    @app.get("/v1/memories")
    async def memories() -> dict[str, Any]:
        return {"object": "list", "data": [_memory(kept) for kept in desk.memories]}

    @app.get("/v1/memories/{id}")
    async def memory(id: str) -> dict[str, Any]:
        return _memory(desk.memory(id))

    @app.delete("/v1/memories/{id}")
    async def forget(id: str) -> dict[str, Any]:
        desk.memory(id)
        try:
            desk.memories.remove(id)
        except PermissionError as error:
            raise Refused(403, str(error)) from None
        return {"id": id, "object": "memory", "deleted": True}

    return app


def _check_model(desk: Desk, name: str) -> None:
    if name != desk.name:
        said = f"there is no model {name!r} here; this server has {desk.name!r}"
        raise Refused(404, said, "model_not_found", "model")


def _model(desk: Desk) -> dict[str, Any]:
    return {"id": desk.name, "object": "model", "created": desk.created, "owned_by": "mosaics"}


def _memory(kept: Kept) -> dict[str, Any]:
    about = {"id": kept.id, "object": "memory", "created": kept.created}
    return about | {"tokens": kept.tokens, "bytes": kept.bytes, "given": kept.given}


def _split(prompt: str | list) -> list:
    """The prompts of a request, each a text or a list of tokens."""
    return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


def _text(content: str | list) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _samplings(desk: Desk, asked, prompts: list[Prompt], tokens: int, logprobs: int | None) -> list[Sampling]:
    """How each of the n answers to a prompt is drawn: they differ in the seed."""
    if tokens > desk.limits.tokens:
        raise Refused(400, f"max_tokens is {tokens}; an answer has at most {desk.limits.tokens}", param="max_tokens")
    for prompt in prompts:
        desk.check_length(prompt, tokens)
    seed = secrets.randbits(62) if asked.seed is None else asked.seed
    stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
    temperature, top_p = (1.0 if x is None else x for x in (asked.temperature, asked.top_p))
    return [
        Sampling(tokens, temperature, top_p, (seed + number) % 2**63, stop, logprobs) for number in range(asked.n or 1)
    ]


class _Completion:
    """How `/v1/completions` answers."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, desk: Desk, prompts: list[Prompt]) -> None:
        self.desk, self.prompts = desk, prompts
        self.about = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": desk.name}

    def body(self, kind: str, choices: list[dict], **more: Any) -> dict[str, Any]:
        return self.about | {"object": kind, "choices": choices} | more

    def opening(self, index: int) -> dict[str, Any] | None:
        """A choice that begins a stream, before any piece."""
        return None

    def choice(self, index: int, piece: Piece, chunk: bool) -> dict[str, Any]:
        """What is said of an answer, or of a piece of it."""
        logprobs = self.logprobs(piece.logprobs) if piece.logprobs else None
        said = {"index": index, "logprobs": logprobs, "finish_reason": piece.finish_reason}
        return said | self.content(piece.text, chunk)

    def content(self, text: str, chunk: bool) -> dict[str, Any]:
        return {"text": text}

    def logprobs(self, found: list[Logprob]) -> dict[str, Any]:
        return {
            "tokens": [one.token for one in found],
            "token_logprobs": [one.logprob for one in found],
            "top_logprobs": [dict(reversed(one.top)) for one in found] if found[0].top else None,
            "text_offset": [one.offset for one in found],
        }

    def usage(self, written: int) -> dict[str, Any]:
        read, cached = sum(p.tokens for p in self.prompts), sum(p.cached for p in self.prompts)
        counts = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return counts | {"prompt_tokens_details": {"cached_tokens": cached}}


class _Chat(_Completion):
    """How `/v1/chat/completions` answers."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def content(self, text: str, chunk: bool) -> dict[str, Any]:
        return {"delta": {"content": text}} if chunk else {"message": {"role": "assistant", "content": text}}

    def logprobs(self, found: list[Logprob]) -> dict[str, Any]:
        def of(token: str, logprob: float) -> dict[str, Any]:
            return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

        return {"content": [of(x.token, x.logprob) | {"top_logprobs": [of(*top) for top in x.top]} for x in found]}


async def _answer(how: _Completion, asked, request: Request, ticket: Ticket, samplings: list[Sampling]) -> Response:
    pieces = ticket.ask(how.prompts, samplings)
    if not asked.stream:
        return await _unless_gone(request, _whole(how, pieces))
    usage = bool(asked.stream_options and asked.stream_options.include_usage)
    return _Events(_chunks(how, pieces, len(how.prompts) * len(samplings), usage), ticket.desk.limits.seconds + 60)


async def _whole(how: _Completion, pieces: AsyncIterator[tuple[int, Piece]]) -> Response:
    came = sorted([event async for event in pieces], key=lambda event: event[0])
    choices, written = [], 0
    for index, group in groupby(came, key=lambda event: event[0]):
        parts = [piece for _, piece in group]
        logprobs = [one for part in parts for one in part.logprobs]
        whole = Piece("".join(p.text for p in parts), sum(p.tokens for p in parts), parts[-1].finish_reason, logprobs)
        written += whole.tokens
        choices.append(how.choice(index, whole, chunk=False))
    return JSONResponse(how.body(how.kind, choices, usage=how.usage(written)))


async def _chunks(
    how: _Completion, pieces: AsyncIterator[tuple[int, Piece]], answers: int, usage: bool
) -> AsyncIterator[bytes]:
    """The events of a stream; one that can't be completed ends with an event that says why."""
    more, written = {"usage": None} if usage else {}, 0
    try:
        for index in range(answers):
            if (opening := how.opening(index)) is not None:
                yield _event(how.body(how.chunk_kind, [opening], **more))
        async for index, piece in pieces:
            written += piece.tokens
            yield _event(how.body(how.chunk_kind, [how.choice(index, piece, chunk=True)], **more))
        if usage:
            yield _event(how.body(how.chunk_kind, [], usage=how.usage(written)))
        yield format_sse_event(data_str="[DONE]")
    except Refused as error:
        yield _event({"error": error.error})


def _event(what: dict[str, Any]) -> bytes:
    return format_sse_event(data_str=json.dumps(what, ensure_ascii=False, separators=(",", ":")))


class _Events(EventSourceResponse):
    """A stream that does not wait for ever for a client that has stopped reading."""

    def __init__(self, events: AsyncIterator[bytes], seconds: float) -> None:
        super().__init__(events, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with asyncio.timeout(self.seconds):
            await super().__call__(scope, receive, send)


async def _unless_gone(request: Request, work) -> Response:
    """What `work` gives, unless the client goes away before; it is given up then."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    done, going = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({done, going}, return_when=asyncio.FIRST_COMPLETED)
        return done.result() if done.done() else Response(status_code=499)
    finally:
        done.cancel()
        going.cancel()


class _Arriving:
    """Refuses a request whose body is too large or does not come in time. Of what is too much nothing is kept, but it
    is taken in, since few clients hear an answer while they speak."""

    def __init__(self, app: ASGIApp, limit: int, seconds: float) -> None:
        self.app, self.limit, self.seconds = app, limit, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        end, arrived, complete = asyncio.get_running_loop().time() + self.seconds, 0, scope["type"] != "http"

        async def received() -> dict[str, Any]:
            nonlocal arrived, complete
            while not complete:
                try:
                    async with asyncio.timeout_at(end):
                        message = await receive()
                except TimeoutError:
                    raise HTTPException(408, f"the body did not arrive in {self.seconds:g} seconds") from None
                arrived += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if arrived <= self.limit:
                    return message
                if complete:
                    raise HTTPException(413, f"the body is larger than {self.limit:,} bytes")
            return await receive()

        await self.app(scope, received, send)


def _invalid(errors: Sequence[Any]) -> Refused:
    """One sentence of what pydantic found."""
    first = errors[0]
    where = [str(part) for part in first["loc"][1:]]
    if first["type"] == "json_invalid":
        return Refused(400, "the body is no JSON")
    if not where:
        return Refused(400, "the body must be a JSON object, sent as application/json")
    name = where[0]
    if first["type"] == "extra_forbidden" and len(where) == 1:
        known = {name for body in _BODIES for name in body.model_fields}
        name = name[:100]
        return Refused(400, f"unrecognized request argument: {name}; {nearest(name, known)}", param=name)
    said = dict.fromkeys(error["msg"] for error in errors if error["loc"][1:2] == first["loc"][1:2])
    path = ".".join(part for part in where if part.isdigit() or part in _FIELDS)  # without the kinds of a union
    return Refused(400, f"{path}: {'; or '.join(said)}"[:500], param=name[:100])
