"""OpenTelemetry, by its real SDK: figures as metrics, and each decision on the span of its request."""

from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    Gauge,
    Histogram,
    HistogramDataPoint,
    InMemoryMetricReader,
    NumberDataPoint,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.types import ASGIApp, Receive, Scope, Send

from ratelimit_mw import Limiter, RateLimitMiddleware, __version__
from ratelimit_mw._internal.observe.stats import CALL_DURATION, METRICS
from ratelimit_mw.otel import instrument
from tests.support.asgi import Down, FakeClock, client_of, limiter_of, ok_app, settings_of, statuses
from tests.support.servers import StoreServer

SETTINGS = """
plans.default = { requests = ["2/minute"] }
plans.trial = { requests = ["1/minute"], shadow = true }
keys = [{ key = "trial", plan = "trial" }]
routes = [{ path = "/v1/{x}" }, { path = "/health", exempt = true }, { path = "/huge", cost = 9 }]
"""


class Traced:
    """Tracing as an app sets it up: a span for each request, around everything else."""

    def __init__(self, app: ASGIApp) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._tracer = provider.get_tracer("app")
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve it within a span."""
        with self._tracer.start_as_current_span("request"):
            await self._app(scope, receive, send)

    def attributes(self) -> list[dict[str, Any]]:
        """Return the attributes of each finished span."""
        return [
            {name.removeprefix("ratelimit."): value for name, value in (span.attributes or {}).items()}
            for span in self._exporter.get_finished_spans()
        ]


class Metered:
    """A limiter whose figures are collected, without spans."""

    def __init__(self, limiter: Limiter) -> None:
        self._reader = InMemoryMetricReader()
        instrument(limiter, meter_provider=MeterProvider([self._reader]), spans=False)

    def scope(self) -> ScopeMetrics:
        """All metrics as they are exported, and who says so."""
        data = self._reader.get_metrics_data()
        assert data is not None
        return data.resource_metrics[0].scope_metrics[0]

    def collect(self) -> dict[str, Any]:
        """The data of every metric."""
        return {metric.name: metric.data for metric in self.scope().metrics}

    def points(self, name: str) -> list[tuple[dict[str, Any], float]]:
        """The values of a metric with their attributes."""
        found = []
        for point in self.collect()[name].data_points:
            assert isinstance(point, NumberDataPoint)
            found.append((dict(point.attributes or {}), point.value))
        return found


async def test_every_figure_is_a_metric() -> None:
    """The names are those of Prometheus with a dot; what only grows is a sum, the rest are gauges."""
    limiter = limiter_of(SETTINGS, FakeClock())
    metered = Metered(limiter)
    await limiter.acquire(api_key="a")
    scope = metered.scope()
    assert (scope.scope.name, scope.scope.version) == ("ratelimit_mw", __version__)
    units = {metric.name: metric.unit for metric in scope.metrics}
    collected = metered.collect()
    assert set(collected) == {metric.name.replace("ratelimit_", "ratelimit.") for metric in METRICS}
    for metric in METRICS:
        data = collected[metric.name.replace("ratelimit_", "ratelimit.")]
        assert units[metric.name.replace("ratelimit_", "ratelimit.")] == metric.unit
        if metric.kind == "counter":
            assert isinstance(data, Sum)
            assert data.is_monotonic
        else:
            assert isinstance(data, Gauge)


async def test_calls_of_the_backend_are_a_histogram(server: StoreServer) -> None:
    """Each call of the script is recorded once, in seconds, into the buckets that Prometheus has, too."""
    settings = settings_of(f'backend = {{ url = "{server.url}", timeout = 5.0 }}\n{SETTINGS}')
    async with Limiter(settings) as limiter:
        metered = Metered(limiter)
        before = limiter.stats().load
        for _ in range(3):
            await limiter.acquire(api_key="a")
        load = limiter.stats().load
    duration = metered.collect()["ratelimit.backend_call_duration"]
    assert isinstance(duration, Histogram)
    (point,) = duration.data_points
    assert isinstance(point, HistogramDataPoint)
    assert tuple(point.explicit_bounds) == CALL_DURATION.bounds
    assert list(point.bucket_counts) == [
        now - then for now, then in zip(load.waits, before.waits, strict=True)
    ]
    assert point.count >= 1
    assert point.sum == pytest.approx(load.waited - before.waited)
    (unit,) = [
        each.unit for each in metered.scope().metrics if each.name == "ratelimit.backend_call_duration"
    ]
    assert unit == "s"


async def test_decisions_have_the_names_of_the_settings() -> None:
    """Plan, rule, outcome and limit are attributes; nothing of a caller is."""
    limiter = limiter_of(SETTINGS, FakeClock())
    metered = Metered(limiter)
    for _ in range(3):
        await limiter.acquire(api_key="a", path="/v1/x")
    expected = [("admitted", "", 2), ("rate", "2/minute", 1)]
    assert metered.points("ratelimit.decisions") == [
        (
            {
                "ratelimit.plan": "default",
                "ratelimit.route": "/v1/{x}",
                "ratelimit.outcome": outcome,
                "ratelimit.limit": limit,
            },
            number,
        )
        for outcome, limit, number in expected
    ]


async def test_gauges_follow_the_moment() -> None:
    """A change of the settings shows under its version, and not under the old one any more."""
    limiter = limiter_of(SETTINGS, FakeClock())
    metered = Metered(limiter)
    before = limiter.version
    assert metered.points("ratelimit.settings_info") == [({"ratelimit.version": before}, 1)]
    limiter.apply(settings_of(SETTINGS.replace("9", "8")))
    assert metered.points("ratelimit.settings_info") == [({"ratelimit.version": limiter.version}, 1)]
    assert limiter.version != before


async def test_a_requests_span_says_how_it_was_decided() -> None:
    """Admitted, refused, or let through by shadow mode; an exempt request says nothing."""
    limiter = limiter_of(SETTINGS, FakeClock())
    instrument(limiter, meter_provider=MeterProvider())
    app = Traced(RateLimitMiddleware(ok_app(), limiter=limiter))
    async with client_of(app, x_api_key="a") as client:
        assert await statuses(client, 3, "/v1/x") == [200, 200, 429]
        assert await statuses(client, 1, "/health") == [200]
        assert await statuses(client, 1, "/huge") == [429]
    async with client_of(app, x_api_key="trial") as client:
        assert await statuses(client, 2) == [200, 200]
    of_route = {"plan": "default", "route": "/v1/{x}"}
    refused = {"outcome": "rate", "limit": "2/minute", "retry_after": 60.0, "remaining": 0}
    assert app.attributes() == [
        {**of_route, "outcome": "admitted", "remaining": 1},
        {**of_route, "outcome": "admitted", "remaining": 0},
        {**of_route, **refused},
        {},
        {"plan": "default", "route": "/huge", "outcome": "cost", "limit": "2/minute", "remaining": 0},
        {"plan": "trial", "outcome": "admitted", "remaining": 0},
        {"plan": "trial", "outcome": "shadow", "limit": "1/minute", "retry_after": 60.0, "remaining": 0},
    ]


async def test_a_span_says_that_the_backend_was_away() -> None:
    """A span tells apart a decision that was made without the backend."""
    clock = FakeClock()
    limiter = limiter_of(SETTINGS, clock, Down(clock=clock))
    instrument(limiter, meter_provider=MeterProvider())
    app = Traced(RateLimitMiddleware(ok_app(), limiter=limiter))
    async with client_of(app, x_api_key="a") as client:
        await client.get("/")
    assert app.attributes() == [
        {"plan": "default", "outcome": "admitted", "without_backend": "local", "remaining": 1}
    ]
    await limiter.close()


async def test_without_tracing_there_is_nothing_to_write_on() -> None:
    """Requests are decided as ever if no span is recorded."""
    limiter = limiter_of(SETTINGS, FakeClock())
    instrument(limiter)
    async with client_of(RateLimitMiddleware(ok_app(), limiter=limiter), x_api_key="a") as client:
        assert await statuses(client, 3) == [200, 200, 429]


async def test_spans_can_be_left_alone() -> None:
    """With `spans=False` there are figures only, and no request is looked at."""
    limiter = limiter_of(SETTINGS, FakeClock())
    Metered(limiter)
    app = Traced(RateLimitMiddleware(ok_app(), limiter=limiter))
    async with client_of(app, x_api_key="a") as client:
        await client.get("/")
    assert app.attributes() == [{}]
    assert limiter.engine.decider.observers is None
