"""Metrics and span attributes for OpenTelemetry (extra `otel`).

    from ratelimit_mw.otel import instrument
    instrument(limiter)

Metrics are those of Prometheus with dots in their names. Attributes are names from the settings, never a
caller.
"""

from collections.abc import Callable, Iterable

from opentelemetry import metrics, trace
from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation

from ratelimit_mw._internal.lease.lease_record import LeaseRecord, LimitedRequest
from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.observe.decision_counts import limit_name, outcome_of
from ratelimit_mw._internal.observe.stats import CALL_DURATION, METRICS, Metric
from ratelimit_mw._internal.runtime.version import __version__


def instrument(limiter: Limiter, *, meter_provider: MeterProvider | None = None, spans: bool = True) -> None:
    """Let OpenTelemetry read a limiter's figures, and tell on each request's span how it was decided.

    `meter_provider` is the global one unless it is given. `spans=False` leaves spans alone. A span is that
    of whoever traces the app: put its middleware around `RateLimitMiddleware`.
    """
    provider = meter_provider or metrics.get_meter_provider()
    meter = provider.get_meter("ratelimit_mw", __version__)
    for metric in METRICS:
        create = (
            meter.create_observable_counter if metric.kind == "counter" else meter.create_observable_gauge
        )
        name = _dotted(metric.name)
        create(name, [_reader(limiter, metric)], unit=metric.unit, description=metric.text)
    duration = meter.create_histogram(
        _dotted(CALL_DURATION.name).removesuffix("_seconds"),
        unit="s",
        description=CALL_DURATION.text,
        explicit_bucket_boundaries_advisory=CALL_DURATION.bounds,
    )
    limiter.backend.call_observers.append(duration.record)
    if spans:
        limiter.observe(describe_span)


def describe_span(request: LimitedRequest, lease: LeaseRecord) -> None:
    """Write a decision onto the current span, if there is one that is recorded."""
    span = trace.get_current_span()
    if not span.is_recording():
        return
    decision, policy, route = lease.decision, request.policy, request.policy.route
    refusal = decision.refusal
    span.set_attribute("ratelimit.plan", policy.identity.plan)
    span.set_attribute("ratelimit.outcome", outcome_of(decision))
    if route is not None:
        span.set_attribute("ratelimit.route", route.path)
    if decision.policy != "shared":
        span.set_attribute("ratelimit.without_backend", decision.policy)
    if refusal is not None:
        span.set_attribute("ratelimit.limit", limit_name(policy, refusal))
        if refusal.retry_after is not None:
            span.set_attribute("ratelimit.retry_after", refusal.retry_after)
    nearest = decision.nearest()
    if nearest is not None:
        window, status = nearest
        span.set_attribute("ratelimit.remaining", max(window.quota - status.used, 0))


def _reader(limiter: Limiter, metric: Metric) -> Callable[[CallbackOptions], Iterable[Observation]]:
    names = [f"ratelimit.{label}" for label in metric.labels]

    def read(_: CallbackOptions) -> Iterable[Observation]:
        for values, number in metric.read(limiter.stats()).items():
            yield Observation(number, dict(zip(names, values, strict=True)))

    return read


def _dotted(name: str) -> str:
    return name.replace("_", ".", 1)
