"""The tables of the settings file: each name with its meaning, unit and default.

What a value may be is in `settings.values`, `settings.limits` and `settings.url`; checks that need more
than one table are in `settings.checks`.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from ratelimit_mw._internal.model.limits import Budget, OnFailure, Slots, Window
from ratelimit_mw._internal.settings.errors import fault, faults
from ratelimit_mw._internal.settings.limits import (
    MAX_QUOTA,
    Concurrent,
    Price,
    Rates,
    money_text,
    parse_amount_of,
)
from ratelimit_mw._internal.settings.units import Estimates, UnitRates
from ratelimit_mw._internal.settings.url import BackendURL, SecretURL, may_use_tls, options_of
from ratelimit_mw._internal.settings.url_options import check_tls, kind_of_url
from ratelimit_mw._internal.settings.values import (
    Account,
    CallerURL,
    Currency,
    HeaderNames,
    HeaderToken,
    Items,
    KeyHash,
    KeyLabel,
    Methods,
    Namespace,
    Network,
    OptionalFile,
    OptionalPath,
    OptionalURL,
    PlanName,
    RoutePath,
    Table,
    TimeZone,
    no_repeats,
)

TLS_FILES = {"tls_ca_file": "ssl_ca_certs", "tls_cert_file": "ssl_certfile", "tls_key_file": "ssl_keyfile"}
"""The TLS files among the settings, with redis-py's names for them."""

Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class BackendSettings(Table):
    """`[backend]`: where counts are kept. Applies at restart."""

    url: BackendURL = SecretURL("memory://")
    """URL of the backend; `settings.url.SCHEMES` lists the kinds.

    Default: "memory://", this process alone."""
    namespace: Namespace = "ratelimit"
    """Prefix of every key in the backend. Default: "ratelimit"."""
    timeout: Annotated[float, Field(gt=0, le=60, allow_inf_nan=False)] = 0.1
    """Seconds a request may wait for the backend. Default: 0.1."""
    on_failure: OnFailure = "local"
    """Decision while the backend is away: "local", "allow" or "deny". Default: "local"."""
    local_share: Share = 1.0
    """Share of each limit that one process grants while the backend is away. Default: 1.0."""
    tls_ca_file: OptionalFile = None
    """Certificates to trust. Default: the system's."""
    tls_cert_file: OptionalFile = None
    """Client certificate; needs `tls_key_file`. Default: none."""
    tls_key_file: OptionalFile = None
    """Key of the client certificate. Default: none."""

    @property
    def safe_url(self) -> str:
        """The URL without user, password and query, for logs and messages."""
        return str(self.url)

    @property
    def is_shared(self) -> bool:
        """Whether several processes can count there together."""
        return not self.safe_url.startswith("memory:")

    @property
    def tls_options(self) -> dict[str, str]:
        """The TLS files under redis-py's names for them."""
        return {option: file for name, option in TLS_FILES.items() if (file := getattr(self, name))}

    @property
    def is_encrypted(self) -> bool:
        """Whether connections use TLS: by the URL's scheme, or by TLS options or files for several hosts."""
        url = self.url.get_secret_value()
        if not may_use_tls(url):
            return False
        options = {**options_of(url), **self.tls_options}
        return kind_of_url(url.partition("://")[0]) == "server with TLS" or any(
            name.startswith("ssl_") for name in options
        )

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        files = [name for name in TLS_FILES if getattr(self, name)]
        if files and not may_use_tls(self.safe_url):
            found = fault("has no effect, since the backend's URL has no TLS", 'a URL such as "rediss://…"')
            raise faults([((files[0],), found)])
        if self.tls_cert_file and not self.tls_key_file:
            raise faults([(("tls_key_file",), fault("is missing", "the key of tls_cert_file"))])
        if self.tls_key_file and not self.tls_cert_file:
            raise faults([(("tls_cert_file",), fault("is missing", "the certificate of tls_key_file"))])
        if may_use_tls(self.safe_url):
            self._check_tls(files)
        return self

    def _check_tls(self, files: Sequence[str]) -> None:
        options = options_of(self.url.get_secret_value())
        for name in files:
            if TLS_FILES[name] in options:
                found = fault(f"is set by option '{TLS_FILES[name]}' of the URL, too", "one of the two")
                raise faults([((name,), found)])
        options |= self.tls_options
        try:
            check_tls(options)
        except PydanticCustomError as error:
            raise faults([((files[0] if files else "url",), error)]) from None


class IdentitySettings(Table):
    """`[identity]`: who is calling."""

    api_key_headers: HeaderNames = ("X-API-Key", "Authorization")
    """Headers that carry an API key. Default: "X-API-Key" and "Authorization"."""
    hash_secret: SecretStr = SecretStr("")
    """Secret under which API keys are hashed and tokens signed. Applies at restart. Default: none."""
    trusted_proxies: Items[Network] = ()
    """Networks whose `forwarded_header` is believed; "unix" is a peer without an address. Default: none."""
    forwarded_header: HeaderToken = "X-Forwarded-For"
    """The header that names the client, or "Forwarded" (RFC 7239). Default: "X-Forwarded-For"."""
    unknown_keys: Literal["default_plan", "anonymous"] = "default_plan"
    """Treatment of a key known nowhere: on `default_plan`, or as anonymous. Default: "default_plan"."""
    default_plan: PlanName = "default"
    """Plan of unknown keys. Default: "default"."""
    anonymous_plan: PlanName = "anonymous"
    """Plan of callers without a key, counted by address. Default: "anonymous"."""
    per_address: Rates = ()
    """Cap on what one address sends anonymously and under unknown keys together. Default: none."""


class ResponseSettings(Table):
    """`[response]`: what clients see."""

    headers: Annotated[Items[Literal["x-ratelimit", "ietf"]], AfterValidator(no_repeats)] = ("x-ratelimit",)
    """Headers that responses carry: any of "x-ratelimit" and "ietf". Default: "x-ratelimit"."""
    reset: Literal["unix", "seconds"] = "unix"
    """Value of `X-RateLimit-Reset`: a Unix time, or seconds from now. Default: "unix"."""
    body: Literal["json", "problem"] = "json"
    """Body of a refusal: our JSON, or RFC 9457 problem details. Default: "json"."""
    documentation_url: OptionalURL = None
    """URL at which clients can read about the limits. Default: none."""
    capacity_status: Literal[429, 503] = 429
    """Status of refusals by limits that all callers share. Default: 429."""


class OperationsSettings(Table):
    """`[operations]`: what operators see."""

    usage_path: OptionalPath = None
    """Path at which a caller reads its own limits and usage. Default: off."""
    dashboard_path: OptionalPath = None
    """Path at which the dashboard is mounted; needs `dashboard_token`. Default: off."""
    dashboard_token: SecretStr = SecretStr("")
    """Token that opens the dashboard. Default: none."""
    dashboard_changes: bool = False
    """Whether plans and counters can be changed from the dashboard. Default: false."""
    logs_url: CallerURL = None
    """URL of a caller's logs, in which `{caller}` stands for the caller's name. Default: no link."""

    @model_validator(mode="after")
    def _dashboard_is_closed(self) -> Self:
        dashboard = self.dashboard_path
        if dashboard is None:
            return self
        if not self.dashboard_token.get_secret_value().strip():
            raise faults([(("dashboard_token",), fault("is missing", "one, since dashboard_path is set"))])
        if dashboard == "/":
            found = fault("'/' covers the whole app", 'a path such as "/dashboard"')
            raise faults([(("dashboard_path",), found)])
        if f"{self.usage_path}/".startswith(f"{dashboard}/"):
            raise faults([(("usage_path",), fault("lies under dashboard_path", "a path of its own"))])
        return self


class ApplicationSettings(Table):
    """`[application]`: limits that all callers share, to protect the service itself."""

    requests: Rates = ()
    """Rates for all callers together. Default: none."""
    concurrent: Concurrent | None = None
    """Slots for all callers together. Default: none."""
    units: UnitRates = Field(default_factory=dict)
    """Rates of metered units, such as tokens, for all callers together. Default: none."""


class SpendingSettings(Table):
    """`spending`: a budget per calendar day, per calendar month, or both."""

    currency: Currency = "USD"
    """A currency's code in capitals, or "token" for whole tokens. Default: "USD"."""
    timezone: TimeZone = "UTC"
    """IANA name of the zone whose days and months count. Default: "UTC"."""
    daily: str | None = None
    """Most that may be spent in a day, as a decimal string. Default: none."""
    monthly: str | None = None
    """Most that may be spent in a month, as a decimal string. Default: none."""
    warn_at: Share | None = None
    """Share of a budget from which on responses carry `X-Spending-*`. Default: none."""
    on_failure: OnFailure | None = None
    """Decision about priced requests while the backend is away. Default: the route's, else the plan's."""

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
            raise fault("is nothing", "more than 0")
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
    """`[plans.NAME]`: the limits that a caller has. What a plan doesn't write it doesn't limit."""

    requests: Rates = ()
    """Rates. Default: none."""
    units: UnitRates = Field(default_factory=dict)
    """Rates of metered units, such as tokens, by the unit's name. Default: none."""
    concurrent: Concurrent | None = None
    """Slots. Default: none."""
    shadow: bool | None = None
    """Decide and report, never refuse. Default: the global one."""
    on_failure: OnFailure | None = None
    """Decision while the backend is away, as `backend.on_failure`. Default: the backend's."""
    share: Literal["key", "account"] = "key"
    """Keys that draw on the same counts: one key, or all keys of one account. Default: "key"."""
    prefetch: bool = False
    """Take blocks of rate units ahead, for large limits. Default: false."""
    spending: SpendingSettings | None = None
    """Budget. Default: none."""


class KeySettings(Table):
    """`[[keys]]`: one API key. What it writes replaces that entry of its plan.

    The file may have the key itself as `key`; `Settings` hashes it and forgets it.
    """

    @classmethod
    def names_in_file(cls) -> tuple[str, ...]:
        """Return every name that the table may have, `key` among them."""
        return ("key", *cls.model_fields)

    hash: KeyHash
    """The key as `ratelimit-mw keys hash` prints it."""
    plan: PlanName
    """The plan it has."""
    account: Account | None = None
    """The account it belongs to. Default: none."""
    label: KeyLabel | None = None
    """Text that is shown beside the key's name. Default: none."""
    requests: Rates | None = None
    """Rates in place of the plan's. Default: the plan's."""
    units: UnitRates | None = None
    """Rates of metered units in place of all of the plan's. Default: the plan's."""
    concurrent: Concurrent | None = None
    """Slots in place of the plan's. Default: the plan's."""
    spending: SpendingSettings | None = None
    """Its own budget, in place of the plan's. Default: the plan's."""


class RouteSettings(Table):
    """`[[routes]]`: what a path costs and the limits it has on top of the plan's. The first match wins."""

    path: RoutePath
    """A path in Starlette's notation, such as "/v1/predictions/{id}"."""
    methods: Methods | None = None
    """The methods it is for. Default: all."""
    exempt: bool = False
    """No limit, no header, no round trip. Default: false."""
    cost: Annotated[int, Field(ge=1, le=MAX_QUOTA)] = 1
    """Units of rate that a request uses. Default: 1."""
    price: Price | None = None
    """Estimate of what a request spends, as a decimal string, charged until settled. Default: none."""
    units: Estimates = Field(default_factory=dict)
    """Estimate of what a request uses of metered units, charged until settled. Default: none."""
    slot: bool = True
    """Whether a request takes a slot. Default: true."""
    requests: Rates = ()
    """Rates of each caller on this route. Default: none."""
    total: Rates = ()
    """Rates of all callers together on this route. Default: none."""
    on_failure: OnFailure | None = None
    """Decision while the backend is away, as `backend.on_failure`. Default: the plan's."""
    shadow: bool | None = None
    """Decide and report, never refuse. Default: the plan's."""

    @model_validator(mode="after")
    def _exempt_has_no_limits(self) -> Self:
        if not self.exempt:
            return self
        names = ("cost", "price", "units", "requests", "total")
        fields = type(self).model_fields
        defaults = {name: fields[name].get_default(call_default_factory=True) for name in names}
        written = [name for name in names if getattr(self, name) != defaults[name]]
        if written:
            raise faults(((name,), fault("an exempt route has no limits")) for name in written)
        return self


BUILT_IN_PLANS = {
    "default": PlanSettings(requests=(Window(60, 1, "minute"),), concurrent=Slots(5)),
    "anonymous": PlanSettings(requests=(Window(20, 1, "minute"),), concurrent=Slots(1)),
}
"""The plans that exist without a file; a table of the same name replaces the whole plan."""
