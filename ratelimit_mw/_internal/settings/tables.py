"""The tables of the settings file: each name with its meaning, unit and default.

What a value may be is in `settings.values` and `settings.limits`; checks that need more than one table are in
`settings.checks`. `settings.schema` makes the descriptions in the JSON schema and in the reference of what is
written below each name: its meaning, and then, after "Default:", what holds without it.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ratelimit_mw._internal.model.limits import Budget, OnFailure
from ratelimit_mw._internal.settings.errors import fault, faults
from ratelimit_mw._internal.settings.limits import (
    MAX_QUOTA,
    MONEY,
    Concurrent,
    Price,
    Rates,
    money_text,
    parse_amount_of,
)
from ratelimit_mw._internal.settings.units import Estimates, UnitRates
from ratelimit_mw._internal.settings.values import (
    Account,
    Currency,
    HeaderNames,
    HeaderToken,
    Items,
    KeyHash,
    KeyLabel,
    Methods,
    Network,
    OptionalURL,
    PlanName,
    Proxy,
    RoutePath,
    Share,
    Table,
    TimeZone,
    no_repeats,
)


class IdentitySettings(Table):
    """`[identity]`: who is calling."""

    api_key_headers: HeaderNames = ("X-API-Key", "Authorization")
    """Headers that may carry an API key. In `Authorization`: `Bearer KEY`, `Basic` with the key as user name,
    or a value without blanks. Two headers with different keys are answered 400. Default: "X-API-Key" and
    "Authorization"."""
    hash_secret: SecretStr = SecretStr("")
    """Secret under which API keys are hashed and tokens signed, best set as
    `RATELIMIT_IDENTITY__HASH_SECRET`. A new secret resets the counts of all keys, and makes old tokens
    invalid. Applies at restart. Default: none."""
    trusted_proxies: Items[Proxy] = ()
    """Networks or addresses of proxies whose `forwarded_header` is believed; "unix" stands for a peer without
    an address. Default: none."""
    forwarded_header: HeaderToken = "X-Forwarded-For"
    """Header that names the client, read from the right past trusted addresses: "X-Forwarded-For",
    "Forwarded" (RFC 7239), or another one that holds addresses. Default: "X-Forwarded-For"."""
    unknown_keys: Literal["default_plan", "anonymous"] = "default_plan"
    """Treatment of a key that is listed nowhere: "default_plan" counts it as a caller of its own on that
    plan, "anonymous" counts it by its address. Default: "default_plan"."""
    default_plan: PlanName = "default"
    """Plan of unknown keys. Default: "default"."""
    anonymous_plan: PlanName = "anonymous"
    """Plan of callers without a key, who are counted by address: IPv6 by /64, and as the IPv4 address where
    it carries one. Default: "anonymous"."""
    per_address: Rates = ()
    """Rates that cap what one address sends without a key and under unknown keys together. Default: none."""
    blocked_networks: Items[Network] = ()
    """Networks or addresses from which every request is refused with 403, with a key or without. Default:
    none."""


class ResponseSettings(Table):
    """`[response]`: what clients see."""

    headers: Annotated[Items[Literal["x-ratelimit", "ietf"]], AfterValidator(no_repeats)] = ("x-ratelimit",)
    """Headers that responses carry: "x-ratelimit", and "ietf" (draft 10 of the RateLimit fields). Default:
    "x-ratelimit"."""
    reset: Literal["unix", "seconds"] = "unix"
    """Form of `X-RateLimit-Reset`: a Unix time, or seconds from now. Default: "unix"."""
    body: Literal["json", "problem"] = "json"
    """Body of a refusal: "json", the library's own, or "problem" (RFC 9457). Default: "json"."""
    documentation_url: OptionalURL = None
    """URL at which clients read about the limits; goes into every refusal. Default: none."""
    capacity_status: Literal[429, 503] = 429
    """Status of refusals by limits that all callers share. Default: 429."""


class ApplicationSettings(Table):
    """`[application]`: limits that all callers share, to protect the service itself."""

    requests: Rates = ()
    """Rates of all callers together. Default: none."""
    prefetch: bool = False
    """Whether workers take units of `requests` ahead, so that most requests ask no backend for them; for
    large limits. Default: false."""
    concurrent: Concurrent | None = None
    """Slots of all callers together. Default: none."""
    units: UnitRates = Field(default_factory=dict)
    """Rates of metered units, such as tokens, of all callers together. Default: none."""


class SpendingSettings(Table):
    """`spending`: a budget per calendar day, per calendar month, or both."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        json_schema_extra={"anyOf": [{"required": ["daily"]}, {"required": ["monthly"]}]}
    )

    currency: Currency = "USD"
    """Code of a currency in capitals, or "token" for whole tokens. Default: "USD"."""
    timezone: TimeZone = "UTC"
    """IANA name of the zone whose days and months count. Default: "UTC"."""
    daily: Annotated[str, MONEY] | None = None
    """Most that may be spent in a calendar day. Default: none."""
    monthly: Annotated[str, MONEY] | None = None
    """Most that may be spent in a calendar month. Default: none."""
    warn_at: Share | None = None
    """Share of a budget, such as 0.8, from which on responses carry `X-Spending-*`. Default: none."""
    on_failure: OnFailure | None = None
    """Decision about requests with a price while the backend is away. Default: the route's, else the
    plan's."""

    @property
    def budget(self) -> Budget:
        """The limit that this table describes."""
        daily = None if self.daily is None else parse_amount_of(self.daily, self.currency)
        monthly = None if self.monthly is None else parse_amount_of(self.monthly, self.currency)
        return Budget(daily, monthly, self.currency, self.timezone, self.warn_at)

    @field_validator("daily", "monthly", mode="before")
    @classmethod
    def _some_money(cls, amount: object, info: ValidationInfo) -> object:
        # Fields before this one are in `data`, those that are wrong left out.
        if amount is None:
            return None
        currency = info.data.get("currency", "USD")
        text = money_text(amount, currency)
        if not parse_amount_of(text, currency):
            raise fault("is 0", "more than 0")
        return text

    @model_validator(mode="after")
    def _month_holds_day(self) -> Self:
        if self.daily is None and self.monthly is None:
            raise fault("limits nothing", "daily, monthly or both")
        budget = self.budget
        if budget.daily is not None and budget.monthly is not None and budget.monthly < budget.daily:
            found = fault(f"'{self.monthly}' is less than daily", f"at least '{self.daily}'")
            raise faults([(("monthly",), found)])
        return self


class PlanSettings(Table):
    """`[plans.NAME]`: the limits that a caller has. What a plan doesn't name is not limited."""

    requests: Rates = ()
    """Rates of each caller. Default: none."""
    units: UnitRates = Field(default_factory=dict)
    """Rates of metered units, which requests estimate and settle, by the unit's name: a small letter and up
    to 31 small letters, digits and hyphens, not `requests`. Default: none."""
    concurrent: Concurrent | None = None
    """Slots of each caller: a whole number, or a table. Default: none."""
    shadow: bool | None = None
    """Whether to decide and report, and never refuse. Default: the global one."""
    on_failure: OnFailure | None = None
    """Decision while the backend is away, as `backend.on_failure`. Default: the backend's."""
    share: Literal["key", "account"] = "key"
    """Keys that draw on the same counts: each key on its own, or all keys of one "account". Default:
    "key"."""
    prefetch: bool = False
    """Whether workers take units of its rates ahead, so that most requests ask no backend; for large limits.
    It works for requests that need nothing but the caller's own rates. Default: false."""
    blocked: bool = False
    """Refuse every request with 403, before anything is charged and without asking the backend. Default:
    false."""
    application_share: Share = 1.0
    """Share of each limit of `[application]`, and of a route's `total`, that callers of this plan may use:
    rounded down, at least 1. The rest is left to others. Default: 1.0."""
    spending: SpendingSettings | None = None
    """Budget of each caller. Default: none."""


def _schema_with_key(schema: dict[str, Any]) -> None:
    """Add the key in the clear, which the file may have in place of its hash, to the JSON schema."""
    text = "The key in the clear; it is hashed when the file is read, and forgotten. Default: this or `hash`."
    key = {"title": "text", "type": "string", "minLength": 1, "description": text}
    schema["properties"] = {"key": key, **schema["properties"]}
    schema["required"] = [name for name in schema["required"] if name != "hash"]
    schema["oneOf"] = [{"required": ["hash"]}, {"required": ["key"]}]


class KeySettings(Table):
    """`[[keys]]`: one API key. What it writes replaces that entry of its plan.

    The file may have the key itself as `key`: `Settings` hashes it and forgets it.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(json_schema_extra=_schema_with_key)

    @classmethod
    def names_in_file(cls) -> tuple[str, ...]:
        """Return every name that the table may have, `key` among them."""
        return ("key", *cls.model_fields)

    hash: KeyHash
    """The key as `ratelimit-mw keys hash` prints it. Default: this or `key`."""
    plan: PlanName
    """Name of the key's plan."""
    account: Account | None = None
    """Account that the key belongs to. Where the plan has `share = "account"`, keys of one account
    have one plan and no limits of their own. Default: none."""
    label: KeyLabel | None = None
    """Text that is shown beside the key's name, such as "Acme, batch". Default: none."""
    requests: Rates | None = None
    """Rates in place of the plan's. Default: the plan's."""
    units: UnitRates | None = None
    """Rates of metered units in place of all of the plan's. Default: the plan's."""
    concurrent: Concurrent | None = None
    """Slots in place of the plan's. Default: the plan's."""
    spending: SpendingSettings | None = None
    """Budget in place of the plan's. Default: the plan's."""


class RouteSettings(Table):
    """`[[routes]]`: what a path costs and the limits it has on top of the plan's. The first match wins."""

    path: RoutePath
    """Path in Starlette's notation, such as "/v1/predictions/{id}" and "/files/{rest:path}"; without the
    `root_path`."""
    methods: Methods | None = None
    """Methods that the rule is for. A WebSocket handshake counts as a GET, and so does HEAD. Default: all."""
    exempt: bool = False
    """Whether requests of the rule are free: no limit, no header, no round trip. Default: false."""
    cost: Annotated[int, Field(ge=1, le=MAX_QUOTA)] = 1
    """Units of each rate that a request uses. Default: 1."""
    price: Price | None = None
    """Estimate of what a request spends, held until it is settled or the request ends. Without effect for
    callers without a budget. Default: none."""
    units: Estimates = Field(default_factory=dict)
    """Estimates of what a request uses of metered units, charged until they are settled. Without effect for
    callers whose plan doesn't limit the unit. Default: none."""
    slot: bool = True
    """Whether a request takes a slot. Default: true."""
    requests: Rates = ()
    """Rates of each caller on this route, on top of its plan's. Default: none."""
    total: Rates = ()
    """Rates of all callers together on this route. Default: none."""
    total_prefetch: bool = False
    """Whether workers take units of `total` ahead, so that most requests ask no backend for them; for large
    limits. Default: false."""
    on_failure: OnFailure | None = None
    """Decision while the backend is away, as `backend.on_failure`. Default: the plan's."""
    shadow: bool | None = None
    """Whether to decide and report, and never refuse. Default: the plan's."""

    @model_validator(mode="after")
    def _exempt_has_no_limits(self) -> Self:
        if not self.exempt:
            return self
        names = ("cost", "price", "units", "requests", "total")
        fields = type(self).model_fields
        defaults = {name: fields[name].get_default(call_default_factory=True) for name in names}
        written = [name for name in names if getattr(self, name) != defaults[name]]
        if written:
            raise faults(
                ((name,), fault("is set, though the route is exempt from all limits", "one of the two"))
                for name in written
            )
        return self


class LimitSettings(Table):
    """`[limits.NAME]`: amounts and switches of a limit that the app declares in its code."""

    requests: Rates | None = None
    """Rates in place of the code's, of the unit that the limit counts. Default: the code's."""
    concurrent: Concurrent | None = None
    """Slots in place of the code's. Default: the code's."""
    shadow: bool | None = None
    """Whether to decide and report, and never refuse. Default: the code's."""
    off: bool = False
    """Whether the limit is left out. Default: false."""
    on_failure: OnFailure | None = None
    """Decision while the backend is away, as `backend.on_failure`. Default: the code's."""


BUILT_IN_PLANS: Mapping[str, Mapping[str, object]] = {
    "default": {"requests": ("60/minute",), "concurrent": 5},
    "anonymous": {"requests": ("20/minute",), "concurrent": 1},
}
"""Tables of the plans that exist without a file; a table of the same name replaces the whole plan."""


def built_in_plans() -> dict[str, PlanSettings]:
    """Make the plans that exist without a file."""
    return {name: PlanSettings.model_validate(table) for name, table in BUILT_IN_PLANS.items()}
