"""The start-up checks that need nothing but the settings. Each is a function from settings to findings.

`ratelimit-mw check` prints what they find, and each process logs it once. What only a running app shows
is looked for in `surroundings`, `address` and `middleware`.
"""

import os
import sys
from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path
from urllib.parse import urlsplit

from ratelimit_mw._internal.checks.amounts import cost_above_limit, estimate_above_limit, price_above_budget
from ratelimit_mw._internal.checks.networks import network_findings
from ratelimit_mw._internal.checks.prefetch import prefetch_without_effect
from ratelimit_mw._internal.checks.routes import route_findings
from ratelimit_mw._internal.runtime.compiled import PURE, is_compiled
from ratelimit_mw._internal.settings import Settings
from ratelimit_mw._internal.settings.findings import Finding
from ratelimit_mw._internal.settings.tables import BUILT_IN_PLANS, built_in_plans
from ratelimit_mw._internal.settings.url import split_url

_PACKAGE = Path(__file__).parents[2]
WIDEST_IPV4, WIDEST_IPV6 = 8, 7
"""Shortest prefixes of networks that anybody owns: `10.0.0.0/8` and `fc00::/7`."""


def findings(settings: Settings) -> tuple[Finding, ...]:
    """Everything that these settings show, warnings and notes."""
    return tuple(
        finding
        for check in (
            _everyone_trusted,
            _no_hash_secret,
            _redis_without_tls,
            route_findings,
            cost_above_limit,
            estimate_above_limit,
            price_above_budget,
            network_findings,
            _unreachable_plans,
            prefetch_without_effect,
            _not_compiled,
            _without_gil,
        )
        for finding in check(settings)
    )


def is_shared(settings: Settings) -> bool:
    """Whether the backend is one that several processes count in together."""
    return settings.backend.is_shared


def _everyone_trusted(settings: Settings) -> Iterator[Finding]:
    for index, network in enumerate(settings.identity.trusted_proxies):
        if isinstance(network, str) or network.prefixlen >= _widest(network):
            continue
        text = (
            f"identity.trusted_proxies[{index}]: {network} has addresses of strangers, so any client "
            f"can choose the address that it is counted by, in {settings.identity.forwarded_header}. Name "
            "your own proxies alone."
        )
        yield Finding("everyone-trusted", text)


def _widest(network: IPv4Network | IPv6Network) -> int:
    return WIDEST_IPV4 if isinstance(network, IPv4Network) else WIDEST_IPV6


def _no_hash_secret(settings: Settings) -> Iterator[Finding]:
    if is_shared(settings) and not settings.identity.hash_secret:
        text = (
            "identity.hash_secret is not set: anybody who reads the backend can test API keys against "
            "their hashes, and lease tokens can be forged."
        )
        yield Finding("no-hash-secret", text)


def _redis_without_tls(settings: Settings) -> Iterator[Finding]:
    url = settings.backend.safe_url
    hosts = [] if settings.backend.is_encrypted else split_url(url).netloc.split(",")
    far = [host for host in hosts if host and not _is_this_machine(host)]
    if far:
        text = (
            f"backend.url: {', '.join(far)} is reached without TLS, so anybody on the network between "
            "can read the password and change the counts."
        )
        yield Finding("redis-without-tls", text)


def _is_this_machine(host: str) -> bool:
    name = urlsplit(f"//{host}").hostname or ""
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def _unreachable_plans(settings: Settings) -> Iterator[Finding]:
    identity = settings.identity
    used = {key.plan for key in settings.keys} | {entry.plan for entry in settings.addresses}
    used.add(identity.anonymous_plan)
    if identity.unknown_keys == "default_plan":
        used.add(identity.default_plan)
    built_in = {} if used >= BUILT_IN_PLANS.keys() else built_in_plans()
    for name, plan in settings.plans.items():
        if name not in used and not plan.blocked and plan != built_in.get(name):
            text = (
                f"[plans.{name}]: no caller gets this plan by this file alone; only a live key or a hook of "
                "the app can give it."
            )
            yield Finding("unreachable-plan", text, "note")


def _not_compiled(_settings: Settings) -> Iterator[Finding]:
    if not is_compiled() and not os.environ.get(PURE):
        text = (
            f"the package in {_PACKAGE} is not compiled, so each request takes more CPU: it is a checkout in "
            "the folder that Python was started in, or was installed with neither a wheel for this platform "
            "nor a C compiler."
        )
        yield Finding("not-compiled", text)


def _without_gil(_settings: Settings) -> Iterator[Finding]:
    is_enabled = getattr(sys, "_is_gil_enabled", None)
    if is_enabled and not is_enabled():
        text = (
            "this Python runs without the GIL, which is not supported: a limiter that event loops of several "
            "threads share may count wrongly. Start Python with PYTHON_GIL=1."
        )
        yield Finding("without-gil", text)
