"""A prediction API in FastAPI, limited per API key and account.

    uvicorn examples.fastapi_app:app

Counts in memory; with several workers or hosts, name a Redis in RATELIMIT_BACKEND__URL. RATELIMIT_SETTINGS
names other settings than fastapi_app.toml.
docker-compose.yml runs it behind a balancer.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from ratelimit_mw import Lease, RateLimitMiddleware
from ratelimit_mw.openapi import add_rate_limit_responses

PRICE_OF_WORD = Decimal("0.001")

app = FastAPI(title="Predictions")
# The last one added is the outermost: CORS answers preflights itself, and puts its headers on refusals too.
own_settings = Path(__file__).with_name("fastapi_app.toml")
app.add_middleware(RateLimitMiddleware, settings=os.environ.get("RATELIMIT_SETTINGS") or own_settings)
app.add_middleware(
    CORSMiddleware,
    allow_origins=["https://app.example.com"],
    allow_headers=["X-API-Key"],
    # Without it browsers hide them from scripts.
    expose_headers=[
        "X-RateLimit-Limit",
        "X-RateLimit-Remaining",
        "X-RateLimit-Reset",
        "Retry-After",
        "retry-after-ms",
        "x-should-retry",
    ],
)
# The schema at /openapi.json tells of refusals and their headers.
add_rate_limit_responses(app)


class Prompt(BaseModel):
    """Prompt to predict from."""

    prompt: Annotated[str, Field(max_length=10_000)]
    seconds: Annotated[float, Field(ge=0, le=10)] = 0.5
    """Seconds that the model takes, to see slots at work."""


class Prediction(BaseModel):
    """Output of a prediction, and its price."""

    output: str
    price: str


class PlainTextStream(StreamingResponse):
    """A text that arrives piece by piece."""

    media_type = "text/plain"


def lease_of(request: Request) -> Lease:
    """Return the lease that the request holds: its slot, and the estimate of its price."""
    lease: Lease = request.state.ratelimit
    return lease


CurrentLease = Annotated[Lease, Depends(lease_of)]


@app.get("/health")
async def health() -> dict[str, str]:
    """For the balancer; exempt from all limits."""
    return {"status": "ok"}


@app.get("/v1/models")
async def models() -> dict[str, list[str]]:
    """A quick request: it counts, and takes no slot."""
    return {"models": ["reverse-1"]}


@app.post("/v1/predictions", status_code=201)
async def predict(prompt: Prompt, lease: CurrentLease) -> Prediction:
    """Holds a slot while it runs, and settles what it really cost."""
    await asyncio.sleep(prompt.seconds)
    return await _settled(prompt.prompt, lease)


@app.post("/v1/batches", status_code=201)
async def predict_many(prompts: list[Prompt], lease: CurrentLease) -> Prediction:
    """One request that counts as ten, with one price for all."""
    return await _settled(" ".join(prompt.prompt for prompt in prompts), lease)


@app.post("/v1/streams", response_class=PlainTextStream)
async def stream(prompt: Prompt) -> PlainTextStream:
    """Word by word. Headers are sent once, at the start."""
    return PlainTextStream(_words(prompt))


async def _settled(text: str, lease: Lease) -> Prediction:
    price = PRICE_OF_WORD * len(text.split())
    await lease.settle(price)  # does nothing for callers without a budget
    return Prediction(output=text[::-1], price=str(price))


async def _words(prompt: Prompt) -> AsyncIterator[str]:
    words = prompt.prompt.split()
    for word in words:
        await asyncio.sleep(prompt.seconds / len(words))
        yield f"{word[::-1]}\n"
