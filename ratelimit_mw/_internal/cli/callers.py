"""Lookup of a command's caller by name, API key, address or account, as the app sees them."""

import os
import re
import sys
from dataclasses import dataclass, replace
from getpass import getpass

from pydantic_core import PydanticCustomError

from ratelimit_mw._internal.cli.names import Caller, Directory, is_name, open_directory
from ratelimit_mw._internal.cli.output import CommandError, UsageError
from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.live.network_entries import network_at
from ratelimit_mw._internal.model.api_key_hash import hash_api_key
from ratelimit_mw._internal.policy.client_address import canonical_address
from ratelimit_mw._internal.policy.identity import Identity
from ratelimit_mw._internal.settings import Settings
from ratelimit_mw._internal.settings.errors import nearest_name
from ratelimit_mw._internal.settings.keys import unusable
from ratelimit_mw._internal.settings.values import parse_network

_HASH = re.compile(r"(?:hmac-)?sha256:[0-9a-f]{64}")
_NOWHERE = "ADDRESS"
"""Stands for the address of a caller of whom no address was named."""


@dataclass(frozen=True, slots=True)
class NamedCaller:
    """Options of the command line that name a caller."""

    key: str | None = None
    """An API key, its hash, a caller's name, or `-` for any of them on standard input."""
    address: str | None = None
    """An address, or the name of a caller who is counted by one."""
    account: str | None = None
    """An account, or its name as a caller."""
    caller: str | None = None
    """Any of them."""

    @property
    def is_nobody(self) -> bool:
        """Whether no caller is named at all."""
        return self.key is self.address is self.account is self.caller is None

    def check(self) -> None:
        """Raise `UsageError` for names that don't go together."""
        if self.account is not None and not self.key is self.address is self.caller is None:
            raise UsageError("--account can't be combined with CALLER, --key or --address")
        if self.caller is not None and not self.key is self.address is None:
            raise UsageError("name the caller once: CALLER can't be combined with --key or --address")


async def find_caller(limiter: Limiter, named: NamedCaller) -> tuple[Caller, str | None]:
    """The one caller that is named, and why live keys could not be read.

    Nobody named is anybody without a key. Does without the backend as far as it can. Raises `CommandError`,
    `BackendError`.
    """
    callers, unread = await _find(limiter, named, needs_backend=False)
    if len(callers) > 1:
        raise CommandError("the keys of this account are counted one by one: name one of them with --key")
    return callers[0], unread


async def find_callers(limiter: Limiter, named: NamedCaller) -> list[Caller]:
    """The callers that are named: one, or the keys of an account that are counted one by one.

    Raises `CommandError`, `BackendError`.
    """
    callers, _ = await _find(limiter, named, needs_backend=True)
    return callers


async def find_entries(limiter: Limiter, keys: list[str]) -> dict[str, str | None]:
    """The hashes of API keys, and networks, in their order; a key with the account whose name stood for it.

    Raises `CommandError`, `BackendError`.
    """
    texts = [read_key(key) for key in keys]
    directory = Directory(limiter)
    if any(map(is_name, texts)):
        await directory.read()
    hashes: dict[str, str | None] = {}
    for text in texts:
        network = await _network_of(limiter, directory, text)
        if network is not None:
            hashes[network] = None
        elif is_name(text):
            hashes |= {each: directory.account(text, each) for each in directory.hashes(text)}
        else:
            hashes[hash_of(text, limiter.settings)] = None
    return hashes


async def _network_of(limiter: Limiter, directory: Directory, text: str) -> str | None:
    """The network that a network, an address or the name of a caller at one stands for; None for other texts.

    Raises `CommandError` for what is nearly a network, and for the name of nobody; `BackendError`.
    """
    if not text.startswith("ip:"):
        return _network_in(text)
    entry = network_at(text)
    if entry is not None and entry in limiter.engine.live.in_force:
        return entry
    (caller,) = await directory.callers(text)
    entry = network_at(caller.identity.partition)
    if entry is None:
        raise CommandError(f"{text} has no known address, so no network can be set for it")
    return entry


def _network_in(text: str) -> str | None:
    try:
        return str(parse_network(text.strip()))
    except PydanticCustomError as error:
        told = error.context or {}
    if "has bits" in told["what"]:
        raise CommandError(f"{told['what']}; did you mean {told['nearest']!r}?")
    return None


def hash_of(key: str, settings: Settings) -> str:
    """The hash of an API key, or the hash itself.

    Raises `CommandError` for a key or a hash that no request can have.
    """
    secret = settings.identity.hash_secret.get_secret_value()
    if _HASH.fullmatch(key.lower()):
        kind = "hmac-sha256" if secret else "sha256"
        if not key.lower().startswith(f"{kind}:"):
            state = "is" if secret else "is not"
            raise CommandError(
                f"a hash of the wrong kind: identity.hash_secret {state} set, so a hash begins with {kind}:"
            )
        return key.lower()
    if key.lower().startswith(("sha256:", "hmac-sha256:")):
        raise CommandError(f"{key!r} is not a hash: expected 64 hexadecimal digits after the colon")
    api_key = os.fsencode(key).strip(b" \t")
    wrong = unusable(api_key)
    if wrong is not None:
        raise CommandError("the API key {}: expected {}".format(*wrong))
    return hash_api_key(api_key, secret)


def read_key(text: str) -> str:
    """A text that was given; for `-` one line of standard input, typed unseen at a terminal."""
    if text != "-":
        return text
    if sys.stdin.isatty():
        return getpass("API key: ")
    return os.fsdecode(sys.stdin.buffer.read().rstrip(b"\r\n"))


def has_known_partition(caller: Caller) -> bool:
    """Whether the partition that counts the caller is known: not for an address that was not named."""
    return caller.identity.partition != f"ip:{_NOWHERE}"


def without_placeholder(caller: Caller) -> Identity:
    """The caller, without the limits of an address that was not named."""
    identity = caller.identity
    return replace(identity, address=None) if identity.address == _NOWHERE else identity


def facts_of(caller: Caller) -> list[tuple[str, str]]:
    """Return the facts that identify a caller, as names and values for people to read."""
    identity = caller.identity
    facts = [
        ("caller", identity.partition),
        ("label", caller.label),
        ("account", identity.account),
        ("API key", identity.api_key_hash),
        ("plan", f"{identity.plan} ({caller.why})"),
    ]
    return [(name, value) for name, value in facts if value]


def block_of(limiter: Limiter, identity: Identity, address: str | None = None) -> str | None:
    """The setting by which every request of a caller is refused; None where none does.

    `address` is where it calls from, if that is not the caller's name.
    """
    kind, _, rest = identity.partition.partition(":")
    text = address or (rest if kind == "ip" else "")
    blocked = limiter.engine.identify.hop_at(text).blocked if text else None
    if blocked is not None:
        index = limiter.settings.identity.blocked_networks.index(blocked)
        return f"identity.blocked_networks[{index}]: {blocked}"
    plan = limiter.settings.plans.get(identity.plan)
    return f"plans.{identity.plan}.blocked" if plan is not None and plan.blocked else None


async def _find(
    limiter: Limiter, named: NamedCaller, *, needs_backend: bool
) -> tuple[list[Caller], str | None]:
    named.check()
    key = None if named.key is None else read_key(named.key)
    caller = None if named.caller is None else read_key(named.caller)
    name = next(
        (each for each in (caller, key, named.address, named.account) if each and is_name(each)), None
    )
    unread = None
    directory = Directory(limiter)
    if name or key or caller or named.account or named.address:
        directory, unread = await open_directory(limiter, needed=needs_backend)
    if name is not None:
        return await directory.callers(name), unread
    if caller is not None:
        accounts = {each.account for _, each in directory.keys().values()}
        if caller in accounts:
            return _of_account(limiter, directory, caller), unread
        if not canonical_address(caller).startswith("peer:"):
            return [_of_address(directory, caller)], unread
        key = caller
    if named.account is not None:
        return _of_account(limiter, directory, named.account), unread
    address = None if named.address is None else _address(named.address)
    if key is None:
        return [_of_address(directory, address)], unread
    return [_of_key(limiter, directory, hash_of(key, limiter.settings), address)], unread


def _address(text: str) -> str:
    address = canonical_address(text)
    if address.startswith("peer:") and not text.startswith("peer:"):
        raise UsageError(
            f"{text!r} is not an address: expected one such as 192.0.2.1 or 2001:db8::1, or unix"
        )
    return text


def _of_key(limiter: Limiter, directory: Directory, api_key_hash: str, address: str | None) -> Caller:
    identity = limiter.engine.identify.of_key(api_key_hash)
    if identity is not None:
        source, key = directory.keys()[api_key_hash]
        return Caller(identity, source, key.label)
    if limiter.settings.identity.unknown_keys == "anonymous":
        why = 'an unknown key: identity.unknown_keys = "anonymous"'
    else:
        why = "an unknown key: identity.default_plan"
    hop = limiter.engine.identify.hop_at(address or "unknown")
    identity = limiter.engine.identify.of_unknown(api_key_hash, hop)
    if identity.plan == hop.plan and identity.partition.startswith("ip:"):
        why = f"an unknown key, counted by its address: {directory.source_of_network(address or '')}"
    return Caller(_with_placeholder(identity, address), why)


def _of_address(directory: Directory, address: str | None) -> Caller:
    caller = directory.at_address(address or "unknown")
    return replace(caller, identity=_with_placeholder(caller.identity, address))


def _with_placeholder(identity: Identity, address: str | None) -> Identity:
    """Return a caller whose limits depend on its address, with a placeholder where none was named."""
    if address is not None:
        return identity
    partition = f"ip:{_NOWHERE}" if identity.partition.startswith("ip:") else identity.partition
    return replace(identity, partition=partition, address=_NOWHERE)


def _of_account(limiter: Limiter, directory: Directory, account: str) -> list[Caller]:
    known = directory.keys().values()
    keys = [(source, key) for source, key in known if key.account == account]
    if not keys:
        accounts = [key.account for _, key in known if key.account is not None]
        nearest = nearest_name(account, accounts)
        hint = f"; did you mean {nearest!r}?" if nearest else ""
        raise CommandError(f"no known key belongs to account {account!r}{hint}")
    callers: dict[str, Caller] = {}
    for source, key in keys:
        identity = limiter.engine.identify.of_key(key.hash)
        if identity is not None:
            label = directory.label(identity.partition)
            callers.setdefault(identity.partition, Caller(identity, source, label))
    return list(callers.values())
