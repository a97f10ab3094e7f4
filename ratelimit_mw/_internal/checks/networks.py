"""Checks of `[[addresses]]`, blocked networks and blocked plans."""

from collections.abc import Iterator

from ratelimit_mw._internal.settings import Settings
from ratelimit_mw._internal.settings.findings import Finding


def network_findings(settings: Settings) -> Iterator[Finding]:
    """Find networks that mean more callers than they may seem to, and limits that nobody can meet."""
    for index, network in enumerate(settings.identity.blocked_networks):
        if network.prefixlen == 0:
            where = f"identity.blocked_networks[{index}]"
            text = f"{where}: {network} refuses every caller of IPv{network.version}."
            yield Finding("everyone-blocked", text)
    if not settings.identity.trusted_proxies:
        yield from _behind_a_proxy(settings)
    for name, plan in settings.plans.items():
        limits = (plan.requests, plan.units, plan.concurrent, plan.spending)
        if plan.blocked and any(limits):
            text = f"[plans.{name}] is blocked, so its limits have no effect."
            yield Finding("no-effect", text, "note")


def _behind_a_proxy(settings: Settings) -> Iterator[Finding]:
    for index, entry in enumerate(settings.addresses):
        plan = settings.plans.get(entry.plan)
        if entry.network.is_private and plan is not None and not plan.blocked:
            text = (
                f"addresses[{index}]: callers in {entry.network} have the plan {entry.plan}, and no proxy is "
                "in identity.trusted_proxies. If a proxy in that network stands in front of the app, every "
                "caller without a key has this plan."
            )
            yield Finding("network-of-proxies", text, "note")
