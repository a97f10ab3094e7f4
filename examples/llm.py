"""An LLM API in the manner of OpenAI's, which limits requests and tokens a minute.

    uvicorn examples.llm:app

A completion is charged its route's estimate when it is admitted, in one step with all other limits, and what
it has used when it is done: a stream at its end, however that comes. So a generous estimate holds others back
only while the completion runs.
"""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ratelimit_mw import Lease, RateLimitMiddleware


async def model(prompt: str, most: int) -> AsyncIterator[str]:
    """Stands for the model: repeats the prompt, a word a token."""
    for word in prompt.split()[:most]:
        yield f"{word} "


async def complete(request: Request) -> Response:
    """`POST /v1/chat/completions {"messages": …, "max_tokens": …, "stream": …}`."""
    body, lease = await request.json(), request.state.ratelimit
    prompt = " ".join(str(message["content"]) for message in body["messages"])
    most = int(body.get("max_tokens") or 1_000)
    if body.get("stream"):
        return StreamingResponse(stream(prompt, most, lease), media_type="text/event-stream")
    words = [word async for word in model(prompt, most)]
    usage = usage_of(prompt, len(words))
    await lease.settle(units={"tokens": usage["total_tokens"]})
    message = {"role": "assistant", "content": "".join(words)}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return JSONResponse({**head("chat.completion"), "choices": [choice], "usage": usage})


async def stream(prompt: str, most: int, lease: Lease) -> AsyncIterator[str]:
    """Server-sent events. What was sent is settled, also where the client hangs up."""
    sent = 0
    try:
        async for word in model(prompt, most):
            sent += 1
            choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
            yield f"data: {json.dumps({**head('chat.completion.chunk'), 'choices': [choice]})}\n\n"
        last = {**head("chat.completion.chunk"), "choices": [], "usage": usage_of(prompt, sent)}
        yield f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n"
    finally:
        await lease.settle(units={"tokens": usage_of(prompt, sent)["total_tokens"]})


def usage_of(prompt: str, completion: int) -> dict[str, int]:
    """Tokens of both sides."""
    read = len(prompt.split())
    return {"prompt_tokens": read, "completion_tokens": completion, "total_tokens": read + completion}


def head(kind: str) -> dict[str, Any]:
    """Return the fields that every answer begins with."""
    return {"id": "cmpl-1", "object": kind, "created": 0, "model": "parrot"}


app = Starlette(routes=[Route("/v1/chat/completions", complete, methods=["POST"])])
app.add_middleware(RateLimitMiddleware, settings=Path(__file__).with_name("llm.toml"))
