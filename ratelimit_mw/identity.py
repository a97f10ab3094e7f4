"""Who is calling: from the headers of a request to the partition that its limits are counted under.

An API key in the clear lives here for the length of a look-up, and in a bounded memory of this process;
what leaves this module is its hash.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ratelimit_mw.address import AddressReader, Scope, canonical_address
from ratelimit_mw.api_keys import hash_api_key
from ratelimit_mw.compiled import core
from ratelimit_mw.room import make_room
from ratelimit_mw.settings import KeySettings, Settings
from ratelimit_mw.settings.errors import nearest_name
from ratelimit_mw.settings.keys import MAX_KEY

if TYPE_CHECKING:
    from ratelimit_mw.policy import Policies, Policy

_BLANKS = b" \t"
_MAX_REMEMBERED = 16_384
_LONGEST_REMEMBERED = 256
_PLAIN_ACCOUNT = re.compile(r"[A-Za-z0-9_.-]{1,64}")
HASH = re.compile(r"(?:hmac-)?sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who is calling, as the limits see it. An `identify=` hook returns one to say so itself."""

    partition: str
    """What the caller is counted under: `k:<hex>` a key, `a:<name>` or `ah:<hex>` an account, `ip:<address>`
    an address, `i:<hex>` what a hook named."""
    plan: str
    """Name of a plan in the settings."""
    api_key_hash: str | None = None
    """As `hash_api_key` makes it. None without a key."""
    account: str | None = None
    """The account that the caller belongs to."""
    address: str | None = None
    """The client address, set where `identity.per_address` caps it: anonymous callers and unknown keys."""
    overrides: KeySettings | None = None
    """Limits that a listed key has in place of its plan's."""


class IdentityError(Exception):
    """A request that doesn't say clearly who is calling."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


class Identifier:
    """Tells who is calling, for one state of the settings.

    Returns the same object for a caller seen before, as long as it is remembered.
    """

    def __init__(self, settings: Settings, registered: Mapping[str, KeySettings] | None = None) -> None:
        """`registered` are the keys, by hash, that are set live; they come before those of the file."""
        identity = settings.identity
        self._settings = settings
        self._default_plan = identity.default_plan
        self._anonymous_plan = identity.anonymous_plan
        self._unknown_are_anonymous = identity.unknown_keys == "anonymous"
        self._caps_addresses = bool(identity.per_address)
        self._secret = identity.hash_secret.get_secret_value()
        self._read_api_key = ApiKeyReader(identity.api_key_headers)
        self._read_address = AddressReader(identity)
        self._keys = {key.hash: key for key in settings.keys} | dict(registered or {})
        self._listed: dict[str, Identity] = {}
        self._by_key: dict[bytes, Identity | str] = {}
        """Keys seen lately: who has them, or the hash of those that are not listed."""
        self._unlisted: dict[tuple[str, str], Identity] = {}

    def __call__(self, scope: Scope) -> Identity:
        """The caller of an `http` or `websocket` scope.

        Raises IdentityError for a key that is too long and for two that differ.
        """
        api_key = self._read_api_key(scope)
        if api_key is None:
            return self.of_address(self._read_address(scope))
        known = self._by_key.get(api_key) or self._look_up(api_key)
        return self.of_unknown(known, self._read_address(scope)) if isinstance(known, str) else known

    def shortcut(self, policies: "Policies") -> "Callable[[Scope], Policy | None] | None":
        """What finds a caller's policy in one compiled step, and has it made where the caller is new; None
        where nothing is compiled. It answers None to a request that is not plain.
        """
        if core is None:
            return None
        known = {
            "by_key": self._by_key,
            "unlisted": self._unlisted,
            "addresses": self._read_address,
            "most": _MAX_REMEMBERED,
            "unknown_by_address": self._unknown_are_anonymous or self._caps_addresses,
        }
        makers = {"look_up": self._look_up, "of_unknown": self.of_unknown, "of_address": self.of_address}
        shortcut: Callable[[Scope], Policy | None] = core.Shortcut(
            self._read_api_key.names, MAX_KEY, policies, {**known, **makers}
        )
        return shortcut

    def read(self, scope: Scope) -> tuple[bytes, str] | None:
        """The API key of a scope and its hash, None where it has none. Raises IdentityError."""
        api_key = self._read_api_key(scope)
        return None if api_key is None else (api_key, self._hash(api_key))

    def address_of(self, scope: Scope) -> str:
        """The client address of a scope, as it is counted under."""
        return self._read_address(scope)

    def anonymous(self, scope: Scope) -> Identity:
        """The caller as one without a key, whatever the headers say."""
        return self.of_address(self._read_address(scope))

    def of_key(self, api_key_hash: str) -> Identity | None:
        """The caller with a key that is set live or listed in the settings, None for any other."""
        listed = self._listed.get(api_key_hash)
        if listed is None and api_key_hash in self._keys:
            listed = self._listed[api_key_hash] = self.of_settings(self._keys[api_key_hash])
        return listed

    def of_settings(self, key: KeySettings) -> Identity:
        """The caller with a key of which these settings hold."""
        return _listed(key, self._settings)

    def of_unknown(self, api_key_hash: str, address: str) -> Identity:
        """The caller with a key that is known nowhere."""
        known = self._unlisted.get((api_key_hash, address))
        if known is not None:
            return known
        if self._unknown_are_anonymous:
            partition, plan = address_partition(address), self._anonymous_plan
        else:
            partition, plan = _key_partition(api_key_hash), self._default_plan
        return self._remember(Identity(partition, plan, api_key_hash, address=address), api_key_hash, address)

    def of_address(self, address: str) -> Identity:
        """The caller without a key. Takes an address as `canonical_address` writes it."""
        known = self._unlisted.get(("", address))
        if known is not None:
            return known
        anonymous = Identity(address_partition(address), self._anonymous_plan, address=address)
        return self._remember(anonymous, "", address)

    def _remember(self, identity: Identity, api_key_hash: str, address: str) -> Identity:
        make_room(self._unlisted, _MAX_REMEMBERED)
        self._unlisted[api_key_hash, address] = identity
        return identity

    def _look_up(self, api_key: bytes) -> Identity | str:
        api_key_hash = hash_api_key(api_key, self._secret)
        known = self.of_key(api_key_hash) or api_key_hash
        if len(api_key) <= _LONGEST_REMEMBERED:
            make_room(self._by_key, _MAX_REMEMBERED)
            self._by_key[api_key] = known
        return known

    def _hash(self, api_key: bytes) -> str:
        known = self._by_key.get(api_key) or self._look_up(api_key)
        return known if isinstance(known, str) else known.api_key_hash or hash_api_key(api_key, self._secret)


class ApiKeyReader:
    """Reads the API key of a scope from the headers that the settings name."""

    def __init__(self, headers: Sequence[str]) -> None:
        self.names = [header.lower().encode("latin-1") for header in headers]
        self._shown = ", ".join(headers)

    def __call__(self, scope: Scope) -> bytes | None:
        """The key as it was sent, without the blanks around it. Raises IdentityError."""
        headers = scope["headers"]
        by_name = dict(headers)
        if len(by_name) < len(headers) or not b"".join(by_name).islower():
            by_name = {}
            for name, value in headers:  # of one that came more than once, the first counts
                by_name.setdefault(name.lower(), value)
        api_key = b""
        for name in self.names:
            value = by_name.get(name)
            if value is None:
                continue
            found = _from_authorization(value) if name == b"authorization" else value.strip(_BLANKS)
            if len(found) > MAX_KEY:
                message = f"API key too long. At most {MAX_KEY} bytes are allowed."
                raise IdentityError(431, "API_KEY_TOO_LONG", message)
            if found and api_key and found != api_key:
                message = f"Ambiguous API key. Send the same one, or only one, in {self._shown}."
                raise IdentityError(400, "AMBIGUOUS_API_KEY", message)
            api_key = api_key or found
        return api_key or None


def address_partition(address: str) -> str:
    """Where callers at an address are counted. Takes it as `canonical_address` writes it."""
    return f"ip:{address}"


def account_partition(account: str) -> str:
    """Where the keys of an account are counted together. Any text is safe."""
    if _PLAIN_ACCOUNT.fullmatch(account):
        return f"a:{account}"
    return f"ah:{hashlib.sha256(account.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}"


def partition_of(name: str, secret: str) -> str:
    """Where a caller that a hook names is counted. Any text is safe, also an API key in the clear."""
    return f"i:{_digits(hash_api_key(name.encode('utf-8', 'surrogatepass'), secret))}"


def adopt(identity: Identity, settings: Settings) -> Identity:
    """What a hook says about a caller, made safe: nothing of it is taken for a partition as it is.

    Raises ValueError for a plan that doesn't exist.
    """
    plan = settings.plans.get(identity.plan)
    if plan is None:
        nearest = nearest_name(identity.plan, settings.plans)
        hint = f"; did you mean {nearest!r}?" if nearest else ""
        raise ValueError(
            f"identify= returned an identity on the plan {identity.plan!r}, which doesn't exist{hint}"
        )
    secret = settings.identity.hash_secret.get_secret_value()
    if plan.share == "account" and identity.account is not None:
        partition = account_partition(identity.account)
    else:
        partition = partition_of(identity.partition, secret)
    api_key_hash = identity.api_key_hash
    if api_key_hash is not None and not HASH.fullmatch(api_key_hash):
        api_key_hash = hash_api_key(api_key_hash.encode("utf-8", "surrogatepass"), secret)
    address = None if identity.address is None else canonical_address(identity.address)
    return Identity(partition, identity.plan, api_key_hash, identity.account, address, identity.overrides)


def _listed(key: KeySettings, settings: Settings) -> Identity:
    if settings.plans[key.plan].share == "account" and key.account is not None:
        partition = account_partition(key.account)
    else:
        partition = _key_partition(key.hash)
    own = key.requests is not None or key.concurrent is not None or key.spending is not None
    return Identity(partition, key.plan, key.hash, key.account, overrides=key if own else None)


def _key_partition(api_key_hash: str) -> str:
    return f"k:{_digits(api_key_hash)}"


def _digits(api_key_hash: str) -> str:
    """Half of a hash: 128 bits tell callers apart, and every byte counts in a backend key."""
    return api_key_hash.partition(":")[2][:32]


def _from_authorization(value: bytes) -> bytes:
    """The key in an `Authorization` header, empty where there is none."""
    if value[:7] == b"Bearer ":  # as nearly all write it, and what follows says the same
        return value[7:].strip(_BLANKS)
    value = value.strip(_BLANKS)
    scheme, _, rest = value.partition(b" ")
    if b"\t" in scheme:
        scheme, _, rest = value.partition(b"\t")
    name = scheme.lower()
    if name == b"bearer":
        return rest.lstrip(_BLANKS)
    if name == b"basic":
        return _user_name(rest.lstrip(_BLANKS))
    return b"" if rest else scheme


def _user_name(credentials: bytes) -> bytes:
    """The user name in `Basic` credentials (RFC 7617), empty where they are malformed."""
    try:
        decoded = base64.b64decode(credentials, validate=True)
    except binascii.Error:
        return b""
    return decoded.partition(b":")[0].strip(_BLANKS)
