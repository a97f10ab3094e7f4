"""Identity of a caller: from the headers of a request to the partition that counts it.

An API key in the clear lives here for the length of a look-up, and in a bounded memory of this process. Only
its hash leaves this module; `read` alone returns the key, for the app's `resolve=` hook.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ratelimit_mw._internal.model.api_key_hash import hash_api_key
from ratelimit_mw._internal.policy.api_key_reader import ApiKeyReader
from ratelimit_mw._internal.policy.client_address import AddressReader, Hop, Scope
from ratelimit_mw._internal.policy.key_entry import KeyEntry
from ratelimit_mw._internal.runtime.bounded import evict_oldest
from ratelimit_mw._internal.settings import AddressSettings, KeySettings, Settings

_MAX_REMEMBERED = 16_384
_LONGEST_REMEMBERED = 256
_PLAIN_ACCOUNT = re.compile(r"[A-Za-z0-9_.-]{1,64}")
HASH = re.compile(r"(?:hmac-)?sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Identity:
    """Identity of a caller. An `identify=` hook returns one, and `Limiter.acquire` takes one.

    An app's own identity needs a name for its caller as `partition`, and a plan. The name is any text that is
    the caller's alone, such as `"user:42"`. The caller is counted under a hash of it.
    """

    partition: str
    """Name of the caller; in an identity that the package hands out, the partition that counts the caller.

    `k:<hex>` is a key, `a:<name>` or `ah:<hex>` an account, `ip:<address>` an address, `i:<hex>` a caller
    that the app named."""
    plan: str
    """Name of a plan in the settings."""
    api_key_hash: str | None = None
    """Hash of the API key, as `hash_api_key` makes it; None without a key."""
    account: str | None = None
    """The account that the caller belongs to."""
    address: str | None = None
    """The client address, set where `identity.per_address` caps it: anonymous callers and unknown keys."""
    overrides: KeyEntry | None = None
    """Limits in place of the plan's. The entry names the same plan."""
    limits: KeySettings | None = field(default=None, kw_only=True, hash=False, repr=False)
    """Limits in place of the plan's as the settings have them. The package sets this, and no app."""
    counted_as: str = field(default="", kw_only=True, compare=False, repr=False)
    """The partition, if the package made it. The package sets this, and no app.

    Any other text in `partition` is the app's name for its caller."""


class Identifier:
    """Tells who is calling, for one state of the settings.

    Returns the same object for a caller seen before, as long as it is remembered.
    """

    def __init__(
        self,
        settings: Settings,
        registered: Mapping[str, KeySettings] | None = None,
        networks: Iterable[AddressSettings] = (),
        *,
        listed: dict[str, KeySettings] | None = None,
    ) -> None:
        """Take the keys, by hash, and the networks that are set live; they come before those of the file.

        The keys of the file may be given as `listed`, where they are known from another identifier.
        """
        identity = settings.identity
        self._settings = settings
        self._default_plan = identity.default_plan
        self._anonymous_plan = identity.anonymous_plan
        self._unknown_are_anonymous = identity.unknown_keys == "anonymous"
        self._caps_addresses = bool(identity.per_address)
        self._unknown_by_address = self._unknown_are_anonymous or self._caps_addresses
        self.api_keys: ApiKeyReader = ApiKeyReader(identity.api_key_headers)
        self._secret = identity.hash_secret.get_secret_value()
        self._read_address = AddressReader(identity, (*settings.addresses, *networks))
        self.blocks_networks: bool = bool(identity.blocked_networks)
        """Whether any network is blocked."""
        self.blocks_plans: bool = any(plan.blocked for plan in settings.plans.values())
        """Whether any plan is blocked."""
        self._registered = {} if registered is None else registered
        self.listed: dict[str, KeySettings] = (
            {key.hash: key for key in settings.keys} if listed is None else listed
        )
        """The keys of the file, by hash."""
        self._listed: dict[str, Identity] = {}
        self._by_key: dict[bytes, Identity | str] = {}
        """Keys seen lately: who has them, or the hash of those that are not listed."""
        self._unlisted: dict[tuple[str, str, str | None], Identity] = {}

    def __call__(self, scope: Scope) -> Identity:
        """The caller of an `http` or `websocket` scope.

        Raises IdentityError for a key that is too long and for two that differ.
        """
        return self.caller(self.api_keys.read(scope["headers"]), scope)

    def caller(self, api_key: bytes, scope: Scope) -> Identity:
        """The caller with this key, as it was sent; without a key, the one at the scope's address."""
        if not api_key:
            return self.at_hop(self._read_address.hop(scope))
        known = self._by_key.get(api_key) or self._look_up(api_key)
        return self.of_unknown(known, self._read_address.hop(scope)) if isinstance(known, str) else known

    def remembers(self, api_key: bytes) -> bool:
        """Whether this key was met lately."""
        return api_key in self._by_key

    def counted_address_key(self, identity: Identity, scope: Scope) -> tuple[str, str | None] | None:
        """The `address_key` a caller, if its limits depend on it; None if they are the same from anywhere."""
        return self.address_key(scope) if self._unknown_by_address and identity.address else None

    def address_key(self, scope: Scope) -> tuple[str, str | None]:
        """The client address of a scope, as it is counted under, and the plan of its network."""
        return self._read_address.hop(scope).address_key

    def blocked_caller(self, scope: Scope) -> Identity | None:
        """The caller at an address in a blocked network, as one without a key; None for anybody else."""
        hop = self._read_address.hop(scope)
        return None if hop.blocked is None else self.at_hop(hop)

    def hop_at(self, address: str) -> Hop:
        """Look up what the settings say of an address, however it is written."""
        return self._read_address.written(address)

    def read(self, scope: Scope) -> tuple[bytes, str] | None:
        """The API key of a scope and its hash, None where it has none. Raises IdentityError."""
        api_key = self.api_keys.read(scope["headers"])
        return (api_key, self._hash(api_key)) if api_key else None

    def address_of(self, scope: Scope) -> str:
        """The client address of a scope, as it is counted under."""
        return self._read_address(scope)

    def hop(self, scope: Scope) -> Hop:
        """The client address of a scope, and what the settings say of it."""
        return self._read_address.hop(scope)

    def anonymous(self, scope: Scope) -> Identity:
        """The caller as one without a key, whatever the headers say."""
        return self.at_hop(self._read_address.hop(scope))

    def of_key(self, api_key_hash: str) -> Identity | None:
        """The caller with a key that is set live or listed in the settings, None for any other."""
        known = self._listed.get(api_key_hash)
        if known is None:
            key = self._registered.get(api_key_hash) or self.listed.get(api_key_hash)
            if key is not None:
                known = self._listed[api_key_hash] = self.of_settings(key)
        return known

    def of_settings(self, key: KeySettings) -> Identity:
        """The caller with a key of which these settings hold."""
        return _listed(key, self._settings)

    def of_unknown(self, api_key_hash: str, hop: Hop) -> Identity:
        """The caller with a key that is known nowhere, at an address."""
        known = self._unlisted.get((api_key_hash, hop.text, hop.plan))
        if known is not None:
            return known
        if self._unknown_are_anonymous:
            partition, plan = address_partition(hop.text), hop.plan or self._anonymous_plan
        else:
            partition, plan = key_partition(api_key_hash), self._default_plan
        identity = Identity(partition, plan, api_key_hash, address=hop.text, counted_as=partition)
        return self._remember(identity, api_key_hash, hop)

    def of_address(self, address: str) -> Identity:
        """The caller without a key at an address, however it is written."""
        return self.at_hop(self.hop_at(address))

    def at_hop(self, hop: Hop) -> Identity:
        """The caller without a key at an address."""
        known = self._unlisted.get(("", hop.text, hop.plan))
        if known is not None:
            return known
        partition, plan = address_partition(hop.text), hop.plan or self._anonymous_plan
        return self._remember(Identity(partition, plan, address=hop.text, counted_as=partition), "", hop)

    def _remember(self, identity: Identity, api_key_hash: str, hop: Hop) -> Identity:
        evict_oldest(self._unlisted, _MAX_REMEMBERED)
        self._unlisted[api_key_hash, hop.text, hop.plan] = identity
        return identity

    def _look_up(self, api_key: bytes) -> Identity | str:
        api_key_hash = hash_api_key(api_key, self._secret)
        known = self.of_key(api_key_hash) or api_key_hash
        if len(api_key) <= _LONGEST_REMEMBERED:
            evict_oldest(self._by_key, _MAX_REMEMBERED)
            self._by_key[api_key] = known
        return known

    def _hash(self, api_key: bytes) -> str:
        known = self._by_key.get(api_key) or self._look_up(api_key)
        return known if isinstance(known, str) else known.api_key_hash or hash_api_key(api_key, self._secret)


def address_partition(address: str) -> str:
    """Return the partition of callers at an address, given as `canonical_address` writes it."""
    return f"ip:{address}"


def account_partition(account: str) -> str:
    """Return the partition that counts the keys of an account together. Any text is safe."""
    if _PLAIN_ACCOUNT.fullmatch(account):
        return f"a:{account}"
    return f"ah:{hashlib.sha256(account.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}"


def partition_of(name: str, secret: str) -> str:
    """Return the partition of a caller that a hook names. Any text is safe, also an API key in the clear."""
    return f"i:{_digits(hash_api_key(name.encode('utf-8', 'surrogatepass'), secret))}"


def _listed(key: KeySettings, settings: Settings) -> Identity:
    if settings.plans[key.plan].share == "account" and key.account is not None:
        partition = account_partition(key.account)
    else:
        partition = key_partition(key.hash)
    limits = (key.requests, key.units, key.concurrent, key.spending)
    own = any(each is not None for each in limits)
    own_limits = key if own else None
    return Identity(partition, key.plan, key.hash, key.account, limits=own_limits, counted_as=partition)


def key_partition(api_key_hash: str) -> str:
    """Return the partition of an API key that doesn't share the counts of its account.

    The partition is also the key's name.
    """
    return f"k:{_digits(api_key_hash)}"


def _digits(api_key_hash: str) -> str:
    """Half of a hash: 128 bits tell callers apart, and every byte counts in a backend key."""
    return api_key_hash.partition(":")[2][:32]
