"""An LLM API that meters tokens: each completion is settled with what the model has really used.

    uvicorn examples.tokens:app

The estimate, `price` in `tokens.toml`, is held while the completion runs. A stream is settled when its last
token has been sent; one that breaks off is settled with what was sent until then.
"""

import json
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ratelimit_mw import Lease, RateLimitMiddleware


async def model(prompt: str) -> AsyncIterator[str]:
    """Stands for the model: repeats the prompt, a word a token."""
    for word in prompt.split():
        yield f"{word} "


async def complete(request: Request) -> Response:
    """`POST /v1/completions {"prompt": …, "stream": …}`."""
    body = await request.json()
    prompt, lease = str(body["prompt"]), request.state.ratelimit
    if body.get("stream"):
        return StreamingResponse(stream(prompt, lease), media_type="text/event-stream")
    words = [word async for word in model(prompt)]
    used = len(prompt.split()) + len(words)
    await lease.settle(used)
    return JSONResponse({"text": "".join(words).strip(), "usage": {"total_tokens": used}})


async def stream(prompt: str, lease: Lease) -> AsyncIterator[str]:
    """Server-sent events, settled at the end, however it comes."""
    used = len(prompt.split())
    try:
        async for word in model(prompt):
            used += 1
            yield f"data: {json.dumps({'text': word})}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        await lease.settle(used)


app = Starlette(routes=[Route("/v1/completions", complete, methods=["POST"])])
app.add_middleware(RateLimitMiddleware, settings=Path(__file__).with_name("tokens.toml"))
