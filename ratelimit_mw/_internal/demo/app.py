"""`ratelimit-mw demo`: a small prediction API behind the middleware, to try the limits by hand.

It counts in memory and needs nothing but this process.
"""

import asyncio
import contextlib
import copy
import json
import logging
import secrets
import socket
import tomllib
import uuid
from collections import OrderedDict
from decimal import Decimal
from importlib.resources import files
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from uvicorn.config import LOGGING_CONFIG

from ratelimit_mw._internal.asgi.middleware import RateLimitMiddleware
from ratelimit_mw._internal.demo.pages import home, reference
from ratelimit_mw._internal.demo.traffic import simulate
from ratelimit_mw._internal.settings import Settings

HOST = "127.0.0.1"
PREDICTION_SECONDS = 1.0
MAX_KEPT = 1_000
"""Predictions that can still be asked for."""

_PRICE = Decimal("0.03")
_PRICE_OF_CHARACTER = Decimal("0.001")
_DEAREST = Decimal("0.05")

_QUIETLY = "curl -s -o /dev/null -w '%{http_code} '"
_WELCOME = """\
A prediction API behind ratelimit_mw, at {url}. Counts are kept in memory. Ctrl-C ends it.
{note}
The dashboard: {url}/dashboard
Its token:     {token}

{traffic}
Try, in another terminal:

{tries}"""
_TRIES = """\
1. One prediction: 201, and the headers X-RateLimit-Limit: 10, X-RateLimit-Remaining: 9.
   curl -i -H 'X-API-Key: alice' -d '{{"prompt": "hello"}}' {url}/v1/predictions

2. Twelve requests at 10 a minute: ten times 200, then 429.
   seq 12 | xargs -I @ {quietly} -H 'X-API-Key: bob' {url}/v1/models

3. Why, and when to come back: RATE_LIMIT_EXCEEDED, with Retry-After.
   curl -i -H 'X-API-Key: bob' {url}/v1/models

4. Four predictions at once with two slots: 201 twice, 429 twice.
   seq 4 | xargs -P 4 -I @ {quietly} -H 'X-API-Key: carol' -d '{{}}' {url}/v1/predictions

5. A budget of 0.12 USD a day. Each prediction holds 0.05 and settles at 0.03, so the fourth is refused.
   seq 4 | xargs -I @ {quietly} -H 'X-API-Key: demo-pro' -d '{{}}' {url}/v1/predictions

6. Why: SPENDING_LIMIT_EXCEEDED, and what is left: X-Spending-Remaining, sent from half of the budget on.
   curl -i -H 'X-API-Key: demo-pro' -d '{{}}' {url}/v1/predictions

7. Without an API key callers are counted by address, at 5 a minute.
   curl -i {url}/v1/models

8. Exempt from all limits: 200, and no rate limit headers.
   curl -i {url}/health
"""


_WITH_TRAFFIC = """\
A few simulated callers send requests. One of them sends far too many: the dashboard says which one, and
why. Open this caller, give it the plan "team", and see that it is admitted; then undo the change.
"""
_WITHOUT_TRAFFIC = """\
What you try below appears there within two seconds.
"""


class Predictions:
    """The model and what it said last."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, dict[str, str]] = OrderedDict()

    async def create(self, request: Request) -> Response:
        """Take a while, settle what it really cost and answer with the result."""
        prompt = await _prompt(request)
        await asyncio.sleep(PREDICTION_SECONDS)
        price = min(_PRICE + _PRICE_OF_CHARACTER * len(prompt), _DEAREST)
        await request.state.ratelimit.settle(price)
        prediction = {"id": uuid.uuid4().hex, "output": prompt[::-1], "price": str(price)}
        self._kept[prediction["id"]] = prediction
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        location = {"Location": f"/v1/predictions/{prediction['id']}"}
        return JSONResponse(prediction, status_code=201, headers=location)

    async def read(self, request: Request) -> Response:
        """Say again what a prediction said."""
        prediction = self._kept.get(request.path_params["id"])
        if prediction is None:
            raise HTTPException(404)
        return JSONResponse(prediction)


def create_app(token: str = "") -> Starlette:
    """The API with its limits; `token` opens its dashboard, and nobody knows it where it is not given."""
    predictions, settings = Predictions(), demo_settings(token)
    routes = [
        Route("/", _home),
        Route("/docs", lambda _request: HTMLResponse(reference(settings))),
        Route("/health", _health),
        Route("/v1/models", _models),
        Route("/v1/predictions", predictions.create, methods=["POST"]),
        Route("/v1/predictions/{id}", predictions.read),
    ]
    limits = Middleware(RateLimitMiddleware, settings=settings)
    return Starlette(routes=routes, middleware=[limits])


def demo_settings(token: str = "") -> Settings:
    """Return the settings of `demo.toml` with a dashboard token.

    Neither the environment nor a file of the caller's changes them.
    """
    said = tomllib.loads(files(__package__).joinpath("demo.toml").read_text("utf-8"))
    said["operations"]["dashboard_token"] = token or _new_token()
    return Settings(**said)


def run(port: int, token: str = "", *, traffic: bool = True) -> None:
    """Serve until Ctrl-C, on another port where this one is taken, and print what to try.

    Without a `token` the dashboard has a new one.
    """
    token = token or _new_token()
    with _listen(port) as listener:
        url = f"http://{HOST}:{listener.getsockname()[1]}"
        note = (
            ""
            if port in (0, listener.getsockname()[1])
            else f"Port {port} is in use, so the demo uses another one.\n"
        )
        hint = _WITH_TRAFFIC if traffic else _WITHOUT_TRAFFIC
        print(
            _WELCOME.format(url=url, note=note, token=token, traffic=hint, tries=_tries(url)),
            flush=True,
        )
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_serve(create_app(token), listener, traffic=traffic))
        print("The demo has ended.")


async def _serve(app: Starlette, listener: socket.socket, *, traffic: bool) -> None:
    server = uvicorn.Server(uvicorn.Config(app, log_config=_log_config(), log_level=None))
    if not traffic:
        await server.serve(sockets=[listener])
        return
    callers = asyncio.create_task(simulate(app, lambda: server.should_exit))
    try:
        await server.serve(sockets=[listener])
    finally:
        callers.cancel()
        await asyncio.wait([callers])


def _new_token() -> str:
    return secrets.token_urlsafe(16)


def _listen(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError:
        listener.bind((HOST, 0))
    return listener


def _log_config() -> dict[str, Any]:
    """Return uvicorn's log configuration without its lines about itself and about the dashboard."""
    config: dict[str, Any] = copy.deepcopy(LOGGING_CONFIG)
    config["loggers"]["uvicorn.error"]["level"] = "WARNING"
    config["filters"] = {"api": {"()": lambda: _is_of_the_api}}
    config["handlers"]["access"]["filters"] = ["api"]
    return config


def _is_of_the_api(record: logging.LogRecord) -> bool:
    return "/dashboard" not in record.getMessage()


async def _prompt(request: Request) -> str:
    try:
        body = json.loads(await request.body())
    except ValueError:
        body = {}
    prompt = body.get("prompt", "") if isinstance(body, dict) else ""
    return prompt if isinstance(prompt, str) else ""


def _tries(url: str) -> str:
    """Return the commands to try in a terminal, for the demo at this URL."""
    return _TRIES.format(url=url, quietly=_QUIETLY)


async def _home(request: Request) -> Response:
    return HTMLResponse(home(_tries(str(request.base_url).rstrip("/"))))


async def _health(_request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _models(_request: Request) -> Response:
    return JSONResponse({"models": ["reverse-1"]})
