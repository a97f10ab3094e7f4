"""All that is made of the settings and of the keys that are set live: one object, swapped as a whole."""

import hashlib
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from ratelimit_mw._internal.live.adoption import adopt
from ratelimit_mw._internal.live.registry import LiveTables
from ratelimit_mw._internal.policy.extended import CodeLimits
from ratelimit_mw._internal.policy.identity import Identifier, Identity
from ratelimit_mw._internal.policy.lookup import PolicyLookup
from ratelimit_mw._internal.policy.policy import Policies
from ratelimit_mw._internal.runtime import threads
from ratelimit_mw._internal.runtime.bounded import evict_oldest
from ratelimit_mw._internal.settings import AddressSettings, KeySettings, Settings

MAX_ADOPTED = 16_384
"""Identities of hooks that are remembered; those made first go first."""

_SECRET = frozenset({"hash_secret", "dashboard_token", "token", "url"})
"""Fields that the version leaves out: it is shown, and a short secret could be found out from it."""


class Rules:
    """Rules in force. A request's policy comes from one object of rules, and holds to the request's end."""

    __slots__ = (
        "_adopted",
        "code_limits",
        "identify",
        "lookup",
        "networks",
        "policies",
        "registered",
        "settings",
        "version",
    )

    def __init__(  # noqa: PLR0913 - all that is in force together
        self,
        settings: Settings,
        policies: Policies,
        code_limits: CodeLimits,
        registered: Mapping[str, KeySettings],
        version: str,
        networks: Sequence[AddressSettings] = (),
        *,
        listed: dict[str, KeySettings] | None = None,
    ) -> None:
        self.settings: Settings = settings
        self.policies: Policies = policies
        self.code_limits: CodeLimits = code_limits
        self.registered: Mapping[str, KeySettings] = registered
        """The keys that are set live, by hash; those left out that don't fit the settings."""
        self.networks: Sequence[AddressSettings] = networks
        """The plans of networks that are set live."""
        self.version: str = version
        """Twelve hex digits that any two processes with the same settings agree on."""
        self.identify: Identifier = Identifier(settings, registered, networks, listed=listed)
        self.lookup: PolicyLookup = PolicyLookup(self.identify, policies)
        """Finds the policy of a request."""
        self._adopted: dict[tuple[str, str], tuple[Identity, Identity]] = {}
        """By the name and the plan that the app gave a caller: the identity as it came, and as it is safe."""

    def adopted(self, identity: Identity) -> Identity:
        """An identity that the app named, made safe; see `adopt`."""
        try:
            name = (identity.partition, identity.plan)
            known = self._adopted.get(name)
        except (AttributeError, TypeError):
            return adopt(identity, self.settings)  # which says what is wrong with it
        if known is not None and known[0] == identity and known[0].counted_as == identity.counted_as:
            return known[1]
        safe = adopt(identity, self.settings)
        if known is None:
            evict_oldest(self._adopted, MAX_ADOPTED)
        self._adopted[name] = (identity, safe)
        return safe

    @classmethod
    def from_settings(cls, settings: Settings, live: LiveTables) -> "Rules":
        """The rules of these settings and live entries."""
        limits = CodeLimits(settings)
        return cls(settings, Policies(settings), limits, live.keys, version_of(settings), live.networks)

    def with_registered(self, live: LiveTables) -> "Rules":
        """Return the rules with other live entries; policies of callers whose keys stay are kept."""
        return Rules(
            self.settings,
            self.policies,
            self.code_limits,
            live.keys,
            self.version,
            live.networks,
            listed=self.identify.listed,
        )


def free(rules: list[Rules]) -> None:
    """Free the rules of a list in a thread, in pieces: an event loop would free all at once."""
    parts = deque[object]()
    while rules:
        policies, settings = rules[-1].policies, rules.pop().settings
        for some in (list(policies.latest.values()), policies.routes.parts, settings.routes):
            parts.extend(some)
        del policies, settings, some
    for _ in threads.in_pieces(range(len(parts))):
        parts.popleft()


def version_of(settings: Settings) -> str:
    """A short name of everything the settings say, secrets left out."""
    return hashlib.sha256(repr(_plain(settings)).encode("utf-8", "backslashreplace")).hexdigest()[:12]


def _plain(value: Any) -> Any:
    """A value whose `repr` is the same in every process."""
    if isinstance(value, BaseModel):
        return {name: _plain(each) for name, each in value if name not in _SECRET}
    if isinstance(value, Mapping):
        return {name: _plain(value[name]) for name in sorted(value)}
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value  # a network too, though it could be asked for all its addresses
