"""Metrics and span attributes for OpenTelemetry (extra `otel`).

    from ratelimit_mw.otel import instrument
    instrument(limiter)

Metrics are those of Prometheus with dots in their names. Attributes are names from the settings, never a
caller.
"""

from collections.abc import Callable, Iterable

from opentelemetry import metrics, trace
from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation

from ratelimit_mw._internal.lease.lease import Lease
from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.observe.decision_counts import ADMITTED, limit_name, outcome_of
from ratelimit_mw._internal.observe.stats import CALL_DURATION, METRICS, Metric
from ratelimit_mw._internal.policy.decision import Decision
from ratelimit_mw._internal.policy.policy import Policy
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
    limiter.engine.backend.call_observers.append(duration.record)
    if spans:
        limiter.engine.observe(describe_span)


def describe_span(lease: Lease) -> None:
    """Write a decision onto the current span, if there is one that is recorded."""
    span = trace.get_current_span()
    if not span.is_recording():
        return
    policy, outcome = lease.policy, lease.outcome
    attributes: dict[str, str | int | float] = {"ratelimit.plan": policy.identity.plan}
    if policy.route is not None:
        attributes["ratelimit.route"] = policy.route.path
    if outcome is None:
        attributes |= _told_of(policy, lease.decision)
    else:  # admitted by the backend, whose answer has all that is told: no decision is put into words
        attributes["ratelimit.outcome"] = ADMITTED
        window = outcome.nearest_of(lease.initial_charge.windows)
        if window is not None:
            attributes["ratelimit.remaining"] = max(window.quota - outcome.used(window.place), 0)
    span.set_attributes(attributes)


def _told_of(policy: Policy, decision: Decision) -> dict[str, str | int | float]:
    """The attributes that tell of any decision."""
    told: dict[str, str | int | float] = {"ratelimit.outcome": outcome_of(decision)}
    refusal, nearest = decision.refusal, decision.nearest()
    if decision.policy != "shared":
        told["ratelimit.without_backend"] = decision.policy
    if refusal is not None:
        told["ratelimit.limit"] = limit_name(policy, refusal)
        if refusal.retry_after is not None:
            told["ratelimit.retry_after"] = refusal.retry_after
    if nearest is not None:
        window, status = nearest
        told["ratelimit.remaining"] = max(window.quota - status.used, 0)
    return told


def _reader(limiter: Limiter, metric: Metric) -> Callable[[CallbackOptions], Iterable[Observation]]:
    names = [f"ratelimit.{label}" for label in metric.labels]

    def read(_: CallbackOptions) -> Iterable[Observation]:
        for values, number in metric.read(limiter.stats()).items():
            yield Observation(number, dict(zip(names, values, strict=True)))

    return read


def _dotted(name: str) -> str:
    return name.replace("_", ".", 1)
