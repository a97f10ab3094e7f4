"""One app behind the middleware on a clock that a scenario moves, and the trace of each request.

A trace is the ordered list of what happened to a request: hooks that were called, the app that was entered,
the messages that it or the middleware received and sent, the error that was raised.
"""

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain, groupby
from typing import Any, NamedTuple
from unittest.mock import patch

from starlette.types import Message, Receive, Scope, Send

from ratelimit_mw import Identity, KeyEntry, Lease, LeaseError, Limiter, RateLimitMiddleware, Settings
from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.limiter.observers import DecisionMade
from ratelimit_mw._internal.model.limits import SECOND
from ratelimit_mw._internal.outage.fallback import LocalPolicy
from ratelimit_mw._internal.policy.decision import Decision
from tests.golden.scenarios import DOORS, Ask, Open, Scenario, Step, Token, Wait, WaitAsTold
from tests.support.asgi import START, Down, settings_of

TIMEOUT = 5.0
"""Seconds that Redis may take: longer than any pause of a busy machine."""
Event = dict[str, Any]
Trace = list[Event]


class Traces(NamedTuple):
    """The trace of a request, and apart from it the decisions that `on_decision` was shown."""

    events: Trace
    decided: Trace


class _Parked(NamedTuple):
    """A request that waits in the app."""

    door: int
    task: "asyncio.Task[None]"
    may_go: asyncio.Event


_traces: ContextVar[Traces] = ContextVar("traces")
"""Traces of the request that is being served."""


class Clock:
    """The time of the counts and, beside it, one that never goes back."""

    def __init__(self) -> None:
        self.now = START * SECOND
        self._steady = 0

    def __call__(self) -> int:
        """Microseconds since 1970."""
        return self.now

    def steady(self) -> float:
        """Seconds that never go back."""
        return self._steady / SECOND

    def wait(self, microseconds: int) -> None:
        """Let time pass; a negative time steps the first clock back."""
        self.now += microseconds
        self._steady += max(microseconds, 0)


def limiter_on(clock: Clock, settings: Settings, url: str | None, *, is_away: bool) -> Limiter:
    """Build a limiter on this clock, in memory or on the Redis at `url`: all that depends on its insides."""
    if url is not None:
        backend: MemoryBackend | RedisBackend = RedisBackend(url, timeout=TIMEOUT, clock=clock)
    else:
        backend = Down(clock=clock) if is_away else MemoryBackend(clock=clock)
    limiter = Limiter(settings, backend=backend)
    limiter.engine.refusals.now = limiter.engine.prefetch.now = clock.steady
    limiter.engine.decider.local = LocalPolicy(backend, clock=clock)
    return limiter


@contextmanager
def without_chance() -> Iterator[None]:
    """Have everything random come out in the middle: the hint for a slot is two seconds."""
    with (
        patch.object(random, "random", lambda: 0.5),
        patch.object(random, "uniform", lambda low, high: (low + high) / 2),
    ):
        yield


class World:
    """The app of one scenario, its hooks, and the requests that are inside."""

    def __init__(self, scenario: Scenario, limiter: Limiter, clock: Clock) -> None:
        self._limiter = limiter
        self._clock = clock
        self._has_prefetch = scenario.has_prefetch
        hooks = {name: getattr(self, f"_{hook}") for name, hook in scenario.hooks.items()}
        self.app = RateLimitMiddleware(self._answer, limiter=limiter, **hooks)
        self._parked: list[_Parked] = []
        self._tokens: list[str] = []
        self.traces: list[Traces] = []

    async def run(self, step: Step) -> None:
        """Do one step, and wait until nothing moves any more."""
        if isinstance(step, Wait):
            self._clock.wait(step.microseconds)
        elif isinstance(step, WaitAsTold):
            self._clock.wait(1000 * self._told_to_wait())
        elif isinstance(step, Open):
            await self._open(step.door)
        elif isinstance(step, Token):
            await self._use_token(step)
        else:
            await asyncio.gather(*[self._start(step) for _ in range(step.at_once)])
        await self._quiet()

    def _told_to_wait(self) -> int:
        """Milliseconds that the last refusal said, if there was one."""
        for traces in reversed(self.traces):
            for header in chain.from_iterable(event.get("headers", ()) for event in traces.events):
                if header.startswith("retry-after-ms: "):
                    return int(header.partition(": ")[2])
        return 0

    async def finish(self) -> None:
        """Let everybody out."""
        for door in DOORS:
            await self._open(door)
        await self._quiet()

    async def _open(self, door: int) -> None:
        """Let the requests out that wait at a door, one after the other."""
        for parked in [each for each in self._parked if each.door == door]:
            self._parked.remove(parked)
            parked.may_go.set()
            await parked.task

    async def _start(self, ask: Ask) -> None:
        """Serve a request until it is over or waits at a door."""
        traces = Traces([], [])
        self.traces.append(traces)
        is_parked = asyncio.Event()
        task = asyncio.create_task(self._serve(ask, traces, is_parked))
        waiting = asyncio.create_task(is_parked.wait())
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not is_parked.is_set():
            await task

    async def _serve(self, ask: Ask, traces: Traces, is_parked: asyncio.Event) -> None:
        _traces.set(traces)
        trace = traces.events
        scope = ask.scope()
        incoming = ["connect", "disconnect"] if scope["type"] == "websocket" else ["request", "disconnect"]

        async def receive() -> Message:
            kind = "http" if scope["type"] == "http" else "websocket"
            message: Message = {"type": f"{kind}.{incoming.pop(0)}"}
            trace.append({"received": message["type"]})
            return message

        async def send(message: Message) -> None:
            trace.append(_event_of(message))

        scope.update(how=ask.how, is_parked=is_parked, task=asyncio.current_task())
        try:
            await self.app(scope, receive, send)
        except RuntimeError as error:
            trace.append({"raised": str(error)})

    async def _quiet(self) -> None:
        """Wait until what nobody waits for has arrived: operations are answered in their order."""
        for _ in range(4):
            await asyncio.sleep(0)
        if self._has_prefetch:
            await self._limiter.acquire(api_key="somebody else")
        for _ in range(4):
            await asyncio.sleep(0)

    # the app and its hooks ----------------------------------------------------------------------

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Do what the request says."""
        trace, how = _traces.get().events, scope["how"]
        trace.append({"app": scope["path"]})
        lease = scope["state"]["ratelimit"]
        if how.get("looks"):
            trace.append(_facts_of(lease.decision) | {"has_id": bool(lease.id)})
        if scope["type"] == "websocket":
            await receive()
        if how.get("raises") == "early":
            raise RuntimeError("the app failed")
        if (door := how.get("door")) is not None:
            self._parked.append(parked := _Parked(door, scope["task"], asyncio.Event()))
            scope["is_parked"].set()
            await parked.may_go.wait()
        await self._use(lease, how, "settle", "detach", "release")
        prefix = ""
        if scope["type"] == "websocket":
            if how["status"] < 400:
                accept = {"type": "websocket.accept", "subprotocol": "chat"}
                await send(accept if how["headers"] is None else {**accept, "headers": how["headers"]})
                await send({"type": "websocket.send", "text": "hello"})
                await send({"type": "websocket.close", "code": 1000, "reason": ""})
                return
            prefix = "websocket."
        start = {"type": f"{prefix}http.response.start", "status": how["status"]}
        await send(start if how["headers"] is None else {**start, "headers": iter(how["headers"])})
        if how.get("raises") == "late":
            raise RuntimeError("the app failed in its response")
        for _ in range(how.get("parts", 0)):
            await send({"type": f"{prefix}http.response.body", "body": b"part", "more_body": True})
        await self._use(lease, how, "settle_late")
        await send({"type": f"{prefix}http.response.body", "body": b"end"})

    async def _use(self, lease: Lease, how: dict[str, Any], *uses: str) -> None:
        for use in uses:
            if use not in how:
                continue
            try:
                if use == "detach":
                    self._tokens.append(await lease.detach(ttl=how[use]))
                elif use == "release":
                    await lease.release()
                else:
                    await lease.settle(how[use])
            except LeaseError as error:
                _traces.get().events.append({use: str(error)})
            else:
                _traces.get().events.append({use: "done"})

    async def _use_token(self, step: Token) -> None:
        trace: Trace = []
        self.traces.append(Traces(trace, []))
        if not self._tokens:
            return
        token = self._tokens[step.place % len(self._tokens)]
        try:
            if step.use == "resume":
                async with self._limiter.resume(token) as job:
                    await job.settle(step.amount)
                    trace.append({"resume": job.is_lost})
            elif step.use == "renew":
                trace.append({"renew": await self._limiter.renew(token)})
            elif step.use == "settle":
                await self._limiter.settle(token, step.amount)
                trace.append({"settle": "done"})
            else:
                await self._limiter.release(token)
                trace.append({"release": "done"})
        except LeaseError as error:
            trace.append({step.use: str(error)})

    def _identify(self, scope: Scope) -> Identity | None:
        """Identify by a header of the app's own."""
        _traces.get().events.append({"hook": "identify"})
        user = next((value.decode() for name, value in scope["headers"] if name.lower() == b"x-api-key"), "")
        plan = {"two": "pro", "three": "budget"}.get(user.strip(), "default")
        return Identity(user, plan) if user.strip() else None

    async def _identify_async(self, scope: Scope) -> Identity | None:
        await asyncio.sleep(0)
        return self._identify(scope)

    def _price(self, scope: Scope, identity: Identity) -> str | None:
        """Estimate by the path; malformed for one of them."""
        _traces.get().events.append({"hook": "price", "of": identity.plan})
        return {"/": "0.0333333", "/huge": "a lot", "/dear": "2.00"}.get(scope["path"])

    async def _price_async(self, scope: Scope, identity: Identity) -> str | None:
        await asyncio.sleep(0)
        return self._price(scope, identity)

    async def _resolve(self, api_key: str) -> KeyEntry | None:
        """Know some of the keys."""
        await asyncio.sleep(0)
        found = {"one": KeyEntry("pro", concurrent=1), "four": KeyEntry("budget", daily="0.30")}
        return found.get(api_key)

    def _on_decision(self, made: DecisionMade) -> None:
        about = {"decided": made.identity.plan, "route": made.route}
        _traces.get().decided.append(about | _facts_of(made.decision))


def _facts_of(decision: Decision) -> Event:
    """Facts of a decision that are the same in every process."""
    refusal = decision.refusal
    return {
        "allowed": decision.allowed,
        "cost": decision.cost,
        "price": decision.price_micros,
        "by": decision.policy,
        "shadow": decision.shadow,
        "refused": None if refusal is None else [refusal.reason, refusal.retry_after_us],
    }


def _event_of(message: Message) -> Event:
    """A message as JSON has it. Headers are copied: they belong to whoever sent them."""
    event = {name: value.decode() if isinstance(value, bytes) else value for name, value in message.items()}
    if "headers" in message:
        event["headers"] = [f"{name.decode()}: {value.decode()}" for name, value in message["headers"]]
    return event


async def answers(scenario: Scenario, url: str | None) -> list[Trace]:
    """Play a scenario, in memory or on the empty Redis at `url`; the trace of each request in it."""
    clock = Clock()
    limiter = limiter_on(clock, settings_of(scenario.settings), url, is_away=scenario.is_away)
    with without_chance():
        async with limiter:
            world = World(scenario, limiter, clock)
            for step in scenario.steps():
                await world.run(step)
            await world.finish()
    return [_short([*traces.events, *traces.decided]) for traces in world.traces]


def _short(trace: Trace) -> Trace:
    """A trace in which an event that comes again and again stands once, with its number."""
    short: Trace = []
    for event, same in groupby(trace):
        number = len(list(same))
        short.append(event if number == 1 else {**event, "times": number})
    return short
