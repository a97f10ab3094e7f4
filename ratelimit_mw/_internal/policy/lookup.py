"""Finds the limits of a request: who is calling, and which rule of the settings holds on its path."""

from ratelimit_mw._internal.policy.api_key_reader import IdentityError
from ratelimit_mw._internal.policy.client_address import Scope
from ratelimit_mw._internal.policy.identity import Identifier, Identity
from ratelimit_mw._internal.policy.policy import Policies, Policy
from ratelimit_mw._internal.runtime.bounded import evict_oldest

MAX_REMEMBERED = 16_384
"""API keys whose latest policy is remembered; the one remembered first is forgotten first."""


class LookupEntry:
    """Policy of a caller on a route, and the caller of this very request."""

    __slots__ = ("address_key", "identity", "index", "policy")

    def __init__(
        self,
        policy: Policy,
        identity: Identity,
        index: int | None,
        address_key: tuple[str, str | None] | None,
    ) -> None:
        self.policy: Policy = policy
        self.identity: Identity = identity
        """Keys of one account, and unknown keys of one address, share a policy and differ in this."""
        self.index: int | None = index
        """Index of the route's rule, None where none matched."""
        self.address_key: tuple[str, str | None] | None = address_key
        """The client address that this was found for, and the plan of its network.

        None where it is the same for any address."""


class PolicyLookup:
    """Finds policies under one state of the settings and the live keys."""

    __slots__ = (
        "_api_keys",
        "_identify",
        "_latest",
        "_policies",
        "_routes",
        "blocks_callers",
        "blocks_networks",
    )

    def __init__(self, identify: Identifier, policies: Policies) -> None:
        self._identify = identify
        self.blocks_networks: bool = identify.blocks_networks
        """Whether `find_blocked` may find anything."""
        self.blocks_callers: bool = identify.blocks_networks or identify.blocks_plans
        """Whether `find_blocked_caller` may find anything."""
        self._policies = policies
        self._routes = policies.routes
        self._api_keys = identify.api_keys
        self._latest: dict[bytes, LookupEntry] = {}
        """By API key, the entry of its latest request: who comes again mostly comes on the same route."""

    def find(self, scope: Scope) -> LookupEntry:
        """Find the policy of an `http` or `websocket` scope. Raises IdentityError."""
        if self.blocks_networks and (blocked := self.find_blocked(scope)) is not None:
            return blocked
        api_key = self._api_keys.read(scope["headers"])
        index = self.index_of(scope) if self._routes.has_rules else None
        entry = self._latest.get(api_key)
        if (
            entry is not None
            and entry.index == index
            and entry.policy.is_latest
            and (entry.address_key is None or entry.address_key == self._identify.address_key(scope))
        ):
            return entry
        is_known = self._identify.remembers(api_key)
        identity = self._identify.caller(api_key, scope)
        address_key = self._identify.counted_address_key(identity, scope)
        entry = LookupEntry(self._policies.at(identity, index), identity, index, address_key)
        if is_known:  # a key that comes again may come often
            if api_key not in self._latest:
                evict_oldest(self._latest, MAX_REMEMBERED)
            self._latest[api_key] = entry
        return entry

    def find_blocked(self, scope: Scope) -> LookupEntry | None:
        """Find the policy of a scope from a blocked network; None for any other. Reads no API key."""
        identity = self._identify.blocked_caller(scope)
        if identity is None:
            return None
        index = self.index_of(scope)
        return LookupEntry(self._policies.blocked(identity, index), identity, index, None)

    def find_blocked_caller(self, scope: Scope) -> LookupEntry | None:
        """Find the policy of a caller whom nobody has to be asked about to know that it is blocked.

        That is one from a blocked network, or with a key of the settings or a live one whose plan is blocked.
        None for any other.
        """
        blocked = self.find_blocked(scope) if self.blocks_networks else None
        if blocked is not None:
            return blocked
        try:
            read = self._identify.read(scope)
        except IdentityError:
            return None
        identity = None if read is None else self._identify.of_key(read[1])
        if identity is None:
            return None
        found = self.find_for(identity, scope)
        return found if found.policy.is_blocked else None

    def find_for(self, identity: Identity, scope: Scope) -> LookupEntry:
        """Find the policy of a caller whom a hook named."""
        return self.find_at(identity, self.index_of(scope))

    def find_at(self, identity: Identity, index: int | None) -> LookupEntry:
        """Find the policy of a caller under a rule, given by its index; None for no rule."""
        return LookupEntry(self._policies.at(identity, index), identity, index, None)

    def index_of(self, scope: Scope) -> int | None:
        """Index of the rule that holds for a request; None for none. A WebSocket handshake is a GET."""
        return self._routes.of_scope(scope)
