"""Which caller a command is about: `--key`, `--address` and `--account`, as the app would see them."""

import asyncio
import os
import re
import sys
from dataclasses import dataclass, replace
from getpass import getpass

from ratelimit_mw._internal.cli.output import CommandError
from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.model.api_key_hash import hash_api_key
from ratelimit_mw._internal.policy.client_address import canonical_address
from ratelimit_mw._internal.policy.identity import Identity
from ratelimit_mw._internal.settings import KeySettings, Settings
from ratelimit_mw._internal.settings.errors import nearest_name
from ratelimit_mw._internal.settings.keys import unusable

_HASH = re.compile(r"(?:hmac-)?sha256:[0-9a-f]{64}")
_NOWHERE = "ADDRESS"
"""Stands for the address of a caller of whom no address was named."""


@dataclass(frozen=True, slots=True)
class Named:
    """Whom the command line names."""

    key: str | None = None
    """An API key, its hash, or `-` for a key on standard input."""
    address: str | None = None
    account: str | None = None

    @property
    def is_nobody(self) -> bool:
        """Whether no caller is named at all."""
        return self.key is None and self.address is None and self.account is None


@dataclass(frozen=True, slots=True)
class Caller:
    """A caller, and why it has its plan."""

    identity: Identity
    who: str
    """The caller in words."""
    why: str
    """What gave it its plan."""


def find_caller(limiter: Limiter, named: Named) -> Caller:
    """The one caller that is named; nobody named is anybody without an API key. Raises `CommandError`."""
    (caller, *others) = find_callers(limiter, named)
    if others:
        raise CommandError("the keys of this account are counted one by one: name one with --key")
    return caller


def find_callers(limiter: Limiter, named: Named) -> list[Caller]:
    """The callers that are named: one, or the keys of an account that are counted one by one."""
    if named.account is not None:
        if named.key is not None or named.address is not None:
            raise CommandError("--account stands alone: without --key and --address")
        return _of_account(limiter, named.account)
    address = None if named.address is None else _address(named.address)
    if named.key is not None:
        return [_of_key(limiter, hash_of(named.key, limiter.settings), address)]
    return [_of_address(limiter, address)]


def hash_of(key: str, settings: Settings) -> str:
    """The hash of an API key, or the hash itself; `-` reads the key from standard input.

    Raises `CommandError` for a key or a hash that no request can have.
    """
    secret = settings.identity.hash_secret.get_secret_value()
    if _HASH.fullmatch(key.lower()):
        kind = "hmac-sha256" if secret else "sha256"
        if not key.lower().startswith(f"{kind}:"):
            state = "is" if secret else "is not"
            raise CommandError(
                f"a hash of the wrong kind: identity.hash_secret {state} set, so hashes begin with {kind}:"
            )
        return key.lower()
    if key.lower().startswith(("sha256:", "hmac-sha256:")):
        raise CommandError(f"{key!r} is no hash: expected 64 hexadecimal digits after the colon")
    api_key = (_standard_input() if key == "-" else os.fsencode(key)).strip(b" \t")
    wrong = unusable(api_key)
    if wrong is not None:
        raise CommandError("the API key {}: expected {}".format(*wrong))
    return hash_api_key(api_key, secret)


def _standard_input() -> bytes:
    """One line; typed unseen at a terminal."""
    if sys.stdin.isatty():
        return os.fsencode(getpass("API key: "))
    return sys.stdin.buffer.read().rstrip(b"\r\n")


def _address(text: str) -> str:
    address = canonical_address(text)
    if address.startswith("peer:") and not text.startswith("peer:"):
        raise CommandError(f"{text!r} is no address: expected one such as 192.0.2.1 or 2001:db8::1, or unix")
    return address


def _of_key(limiter: Limiter, api_key_hash: str, address: str | None) -> Caller:
    identity, who = limiter.identify.of_key(api_key_hash), f"API key {api_key_hash}"
    if identity is not None:
        who += f" of account {identity.account}" if identity.account is not None else ""
        return Caller(identity, who, _known_keys(limiter)[api_key_hash][0])
    if limiter.settings.identity.unknown_keys == "anonymous":
        who, why = f"{who}, known nowhere", 'identity.unknown_keys = "anonymous"'
    else:
        who, why = f"{who}, known nowhere", "identity.default_plan"
    return Caller(_placed(limiter.identify.of_unknown(api_key_hash, address or "unknown"), address), who, why)


def _of_address(limiter: Limiter, address: str | None) -> Caller:
    identity = _placed(limiter.identify.of_address(address or "unknown"), address)
    at = "" if address is None else f", at {address}"
    return Caller(identity, f"no API key{at}", "identity.anonymous_plan")


def _placed(identity: Identity, address: str | None) -> Identity:
    """A caller whose address matters: where none was named, a placeholder stands for it."""
    if address is not None:
        return identity
    partition = f"ip:{_NOWHERE}" if identity.partition.startswith("ip:") else identity.partition
    return replace(identity, partition=partition, address=_NOWHERE)


def is_placed(caller: Caller) -> bool:
    """Whether it is known where the caller is counted."""
    return caller.identity.partition != f"ip:{_NOWHERE}"


def without_placeholder(caller: Caller) -> Identity:
    """The caller, without the limits of an address that was not named."""
    identity = caller.identity
    return replace(identity, address=None) if identity.address == _NOWHERE else identity


def _of_account(limiter: Limiter, account: str) -> list[Caller]:
    known = _known_keys(limiter).values()
    keys = [(place, key) for place, key in known if key.account == account]
    if not keys:
        accounts = [key.account for _, key in known if key.account is not None]
        nearest = nearest_name(account, accounts)
        hint = f"; did you mean {nearest!r}?" if nearest else ""
        raise CommandError(f"no known key belongs to account {account!r}{hint}")
    callers: dict[str, Caller] = {}
    for place, key in keys:
        identity = limiter.identify.of_key(key.hash)
        if identity is not None:
            shared = limiter.settings.plans[key.plan].share == "account"
            who = f"account {account}" if shared else f"API key {key.hash} of account {account}"
            callers.setdefault(identity.partition, Caller(identity, who, place))
    return list(callers.values())


def read_live_keys(limiter: Limiter, named: Named) -> None:
    """Learn the keys that were set live, where one of them may be meant. Raises `BackendError`."""
    if limiter.settings.backend.is_shared and (named.key or named.account):
        asyncio.run(limiter.live.read_keys())


def _known_keys(limiter: Limiter) -> dict[str, tuple[str, KeySettings]]:
    """Where each known key is listed, by its hash: `live` or a place in the file."""
    keys = {key.hash: (f"keys[{index}]", key) for index, key in enumerate(limiter.settings.keys)}
    return keys | {each: ("live", key) for each, key in limiter.live.rules.registered.items()}
