"""`ratelimit-mw explain`: which limits a request would meet, and what each comes from."""

from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from ratelimit_mw._internal.asgi.app_routes import Mounted
from ratelimit_mw._internal.asgi.marked_routes import MarkedRoutes
from ratelimit_mw._internal.cli.apps import code_limit_json, code_limit_text
from ratelimit_mw._internal.cli.callers import NamedCaller, block_of, facts_of, find_caller
from ratelimit_mw._internal.cli.counts import run_with
from ratelimit_mw._internal.cli.names import Caller, is_name
from ratelimit_mw._internal.cli.output import UsageError, console, print_facts, print_json, print_table
from ratelimit_mw._internal.cli.texts import (
    SHARED_BY,
    estimates_text,
    limit_json,
    owner_json,
    route_text,
    source_of,
    source_of_key,
)
from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.model.limit_text import amount_text, limit_text
from ratelimit_mw._internal.model.money import format_amount
from ratelimit_mw._internal.policy.policy import Policy
from ratelimit_mw._internal.settings import PlanSettings, Settings, SpendingSettings

if TYPE_CHECKING:
    from ratelimit_mw._internal.policy.code_limits import Limit


def explain(
    limiter: Limiter,
    request: tuple[str, str],
    named: NamedCaller,
    mounted: Mounted | None = None,
    *,
    as_json: bool,
) -> None:
    """Print who a request of this method and path counts as, and what holds for it.

    Charges nothing. Of the backend it asks for no more than the live keys, and does without them where it is
    away. Raises `CommandError`, `BackendError`.
    """
    method, path = request[0].upper(), unquote(request[1].partition("?")[0])
    if not path.startswith("/"):
        raise UsageError(f"{path!r} is not a path: it begins with a slash")
    caller, unread = run_with(limiter, find_caller(limiter, named))
    address = named.address if named.address and not is_name(named.address) else None
    blocked_by = block_of(limiter, caller.identity, address)
    policy = limiter.engine.policy_of(caller.identity, method, path, address=address or _address_in(caller))
    explained = _Explained(limiter.settings, caller, policy)
    explained.blocked_by = blocked_by
    explained.live_keys_unread = unread
    if mounted is not None and not policy.is_decided:
        marked = MarkedRoutes(mounted.app).find("http", method, path)
        explained.code_limits = () if marked is None else marked.limits
    if as_json:
        print_json({"method": method, "path": path, **explained.json()})
        return
    console.print(f"{method} {path}", soft_wrap=True)
    console.print()
    print_facts(explained.facts())
    if explained.policy.priced_charge.counters and not explained.policy.is_exempt:
        console.print()
        print_table(("limit", "counted for", "from"), explained.rows())


class _Explained:
    """A policy, and for each thing in it the reason."""

    def __init__(self, settings: Settings, caller: Caller, policy: Policy) -> None:
        self.settings = settings
        self.caller = caller
        self.policy = policy
        self.route_source = ""
        self.code_limits: tuple[Limit, ...] = ()
        """Limits in the code of the app, where that is known."""
        self.live_keys_unread: str | None = None
        """Reason why it is unknown whether the key has another plan live; None if it is known."""
        self.blocked_by: str | None = None
        """The setting by which every request is refused; None where none does."""
        if policy.route is not None:
            self.route_source = f"routes[{_index_of_rule(settings, policy)}]"

    def json(self) -> dict[str, Any]:
        """All of it, for programs."""
        identity, policy = self.policy.identity, self.policy
        on_failure, on_failure_from = self.on_failure()
        shadow, shadow_from = self.shadow()
        limits = [
            {
                **limit_json(counter.limit),
                "owner": owner_json(counter),
                "partition": counter.partition,
                "from": source_of(self.settings, identity, counter),
            }
            for counter in policy.priced_charge.counters
        ]
        return {
            "identity": {
                "partition": identity.partition,
                "api_key_hash": identity.api_key_hash,
                "account": identity.account,
                "label": self.caller.label,
                "address": identity.address,
            },
            "plan": {"name": identity.plan, "from": self.caller.why},
            "live_keys_unread": self.live_keys_unread,
            "route": {"rule": route_text(policy.route), "from": self.route_source} if policy.route else None,
            "exempt": policy.is_exempt,
            "blocked": {"value": policy.is_blocked, "from": self.blocked_by},
            "cost": policy.charge.cost,
            "price": self.price_json(),
            "units": self.estimates(),
            "limits": [] if policy.is_exempt else limits,
            "code_limits": [code_limit_json(limit, self.settings) for limit in self.code_limits],
            "never_admitted": policy.too_small is not None and not policy.is_exempt,
            "shadow": {"value": shadow, "from": shadow_from},
            "on_failure": {"value": on_failure, "from": on_failure_from},
        }

    def price_json(self) -> dict[str, str] | None:
        """The estimate that is charged, None where none is."""
        price, currency = self.policy.price, self.policy.currency
        if price is None or currency is None or self.policy.is_exempt:
            return None
        return {"amount": format_amount(price, currency), "currency": currency}

    def facts(self) -> list[tuple[str, str]]:
        """All but the limits, for people."""
        policy = self.policy
        facts = facts_of(self.caller)
        if self.live_keys_unread:
            facts.append(("live keys", f"unknown: {self.live_keys_unread}"))
        facts.append(("route", self.route()))
        if policy.is_blocked:
            shadow, shadow_from = self.shadow()
            only = f", but shadow mode lets it through ({shadow_from})" if shadow else ""
            return [*facts, ("blocked", f"every request is refused with 403 ({self.blocked_by}){only}")]
        if policy.is_exempt:
            return [*facts, ("limits", f"none: the route is exempt ({self.route_source})")]
        facts.append(("cost", f"{policy.charge.cost}{self.never()}"))
        on_failure, on_failure_from = self.on_failure()
        shadow, shadow_from = self.shadow()
        return [
            *facts,
            ("price", self.price()),
            *self.units_facts(),
            *[("in code", code_limit_text(limit, self.settings)) for limit in self.code_limits],
            ("shadow", f"{'on, so it is never refused' if shadow else 'off'} ({shadow_from})"),
            ("when the backend is away", f"{on_failure} ({on_failure_from})"),
        ]

    def rows(self) -> list[tuple[str, str, str]]:
        """The limits, for people."""
        identity = self.policy.identity
        return [
            (limit_text(counter.limit), SHARED_BY[counter.owner], source_of(self.settings, identity, counter))
            for counter in self.policy.priced_charge.counters
        ]

    def route(self) -> str:
        """The rule that matches, and where it is written."""
        route = self.policy.route
        return f"{route_text(route)} ({self.route_source})" if route else "no rule matches: the plan alone"

    def never(self) -> str:
        """Whether the cost is beyond a limit."""
        counter = self.policy.too_small
        return f", which never fits into {limit_text(counter.limit)}: always refused" if counter else ""

    def price(self) -> str:
        """The estimate, and why none is charged where the route has one."""
        policy = self.policy
        if policy.price is not None and policy.currency is not None:
            return f"{amount_text(policy.price, policy.currency)} until the request is settled"
        if policy.route is not None and policy.route.price is not None:
            return f"{policy.route.price}, not charged: the caller has no budget"
        return "none"

    def estimates(self) -> dict[str, int]:
        """Return the amount of each metered unit that is charged until the unit is settled."""
        return {} if self.policy.is_exempt else self.policy.charge.units

    def units_facts(self) -> list[tuple[str, str]]:
        """The estimates of metered units, for people; nothing where no unit is limited."""
        estimates = self.estimates()
        if not estimates:
            return []
        charged = {unit: amount for unit, amount in estimates.items() if amount}
        text = f"{estimates_text(charged)} until settled" if charged else "no estimate: charged when settled"
        return [("units", text)]

    def shadow(self) -> tuple[bool, str]:
        """Whether refusals are only reported, and what says so."""
        for owner, source in ((self.policy.route, self.route_source), (self._plan, self._plan_source)):
            if owner is not None and owner.shadow is not None:
                return owner.shadow, f"{source}.shadow"
        return self.policy.shadow, "shadow"

    def on_failure(self) -> tuple[str, str]:
        """Return the `on_failure` that decides while the backend is away, and the setting that says so."""
        policy, (spending, spending_source) = self.policy, self._spending()
        if policy.price is not None and spending is not None and spending.on_failure is not None:
            return policy.on_failure_priced, f"{spending_source}.on_failure"
        for owner, source in ((policy.route, self.route_source), (self._plan, self._plan_source)):
            if owner is not None and owner.on_failure is not None:
                return policy.on_failure, f"{source}.on_failure"
        return policy.on_failure, "backend.on_failure"

    @property
    def _plan(self) -> PlanSettings:
        return self.settings.plans[self.policy.identity.plan]

    @property
    def _plan_source(self) -> str:
        return f"plans.{self.policy.identity.plan}"

    def _spending(self) -> tuple[SpendingSettings | None, str]:
        """The caller's budget, and where it is written."""
        key = self.policy.identity.limits
        if key is not None and key.spending is not None:
            return key.spending, f"{source_of_key(self.settings, key)}.spending"
        return self._plan.spending, f"{self._plan_source}.spending"


def _address_in(caller: Caller) -> str | None:
    kind, _, rest = caller.identity.partition.partition(":")
    return rest if kind == "ip" else None


def _index_of_rule(settings: Settings, policy: Policy) -> int:
    """Return the index of a policy's route rule in the file.

    The rule is found by identity, as two rules may say the same.
    """
    return next(index for index, route in enumerate(settings.routes) if route is policy.route)
