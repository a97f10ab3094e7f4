"""API keys that the settings list: clear ones are hashed before anything else looks at them."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ratelimit_mw._internal.model.api_key_hash import hash_api_key
from ratelimit_mw._internal.settings.errors import (
    SettingsProblem,
    nearest_name,
    one_of,
    path_of,
    shown,
    type_name,
)
from ratelimit_mw._internal.settings.tables import KeySettings, PlanSettings

MAX_KEY = 16 * 1024
"""Bytes of the longest API key that a request may carry."""

_NO_HASH = f"sha256:{'0' * 64}"


class ListedKeys(NamedTuple):
    """The `[[keys]]` entries without keys in the clear."""

    entries: Any
    """Entries of the file, each `key` replaced by its `hash`."""
    fields: Mapping[int, str]
    """Field in which a sound entry has its key, `key` or `hash`, by the entry's index."""
    problems: tuple[SettingsProblem, ...]


def hash_listed_keys(entries: Any, secret: str) -> ListedKeys:
    """Return the entries with every clear key hashed under `secret`.

    An entry with both or neither, or with an impossible key, is a problem; it gets a hash of zeros, so
    that the rest of it can be checked.
    """
    if not isinstance(entries, list | tuple):
        return ListedKeys(entries, {}, ())
    hashed, fields, problems = [], {}, []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            if isinstance(entry, KeySettings):
                fields[index] = "hash"
            hashed.append(entry)
            continue
        path, what, expected = _inspect(entry)
        rest = {name: value for name, value in entry.items() if name != "key"}
        if what:
            problems.append(SettingsProblem("", path_of(("keys", index, *path)), what, expected))
            rest["hash"] = _NO_HASH
        else:
            fields[index] = path[0]
            rest.setdefault("hash", hash_api_key(_key_bytes(entry.get("key", "")), secret))
        hashed.append(rest)
    return ListedKeys(hashed, fields, tuple(problems))


def check_keys(
    keys: Mapping[int, KeySettings], fields: Mapping[int, str], plans: Mapping[str, PlanSettings | None]
) -> Iterator[SettingsProblem]:
    """Yield what is wrong between keys, and between keys and plans."""
    first: dict[str, int] = {}
    unknown: dict[str, SettingsProblem] = {}
    for index, key in keys.items():
        if index in fields:
            other = first.setdefault(key.hash, index)
            if other != index:
                what = f"is the same API key as {path_of(('keys', other, fields[other]))}"
                yield _problem(index, fields[index], what, "each key once")
        if plans and key.plan not in plans:
            if key.plan not in unknown:  # which takes a look at every plan
                unknown[key.plan] = unknown_plan((), key.plan, plans)
            yield unknown[key.plan]._replace(path=path_of(("keys", index, "plan")))
    yield from _check_accounts(keys, plans)


def check_hash_kind(
    keys: Mapping[int, KeySettings], fields: Mapping[int, str], has_secret: bool
) -> Iterator[SettingsProblem]:
    """Yield the listed hashes that no request's key can ever have with or without a secret."""
    kind, because = ("hmac-sha256", "is") if has_secret else ("sha256", "is not")
    for index, key in keys.items():
        if fields.get(index) == "hash" and not key.hash.startswith(f"{kind}:"):
            what = f"is a hash of the wrong kind, since identity.hash_secret {because} set"
            yield _problem(index, "hash", what, f"'{kind}:' and 64 hex digits")


def unknown_plan(path: tuple[int | str, ...], name: str, plans: Mapping[str, object]) -> SettingsProblem:
    """Return the problem that no plan has a name."""
    what = f"there is no plan {shown(name)}"
    return SettingsProblem("", path_of(path), what, one_of([*plans][:20]), nearest_name(name, plans))


def unusable(api_key: bytes) -> tuple[str, str] | None:
    """Return the reason why no request can have this key, and the expected form; None if one can."""
    if not api_key:
        return "is empty", "an API key"
    if len(api_key) > MAX_KEY:
        return "is too long", f"at most {MAX_KEY} bytes"
    if any(each in api_key for each in b"\r\n\0"):
        return "has a line break or a zero byte", "a single line, as in a header"
    return None


def _inspect(entry: Mapping[str, Any]) -> tuple[tuple[str, ...], str, str]:
    """Return the name under which an entry has its key, what is wrong with that, and what was expected."""
    if ("key" in entry) == ("hash" in entry):
        return (), "has both key and hash" if "key" in entry else "has neither key nor hash", "one of the two"
    if "hash" in entry:
        return ("hash",), "", ""
    key = entry["key"]
    if not isinstance(key, str):
        return ("key",), f"is {type_name(key)}", "a string"
    return ("key",), *(unusable(_key_bytes(key)) or ("", ""))


def _key_bytes(key: str) -> bytes:
    """Return the key as a request carries it: without surrounding blanks."""
    return key.strip(" \t").encode()


def _check_accounts(
    keys: Mapping[int, KeySettings], plans: Mapping[str, PlanSettings | None]
) -> Iterator[SettingsProblem]:
    def shared(key: KeySettings) -> bool:
        plan = plans.get(key.plan)
        return plan is not None and plan.share == "account"

    sharing = {key.account: key.plan for key in reversed([*keys.values()]) if shared(key)}
    for index, key in keys.items():
        if shared(key):
            yield from _check_sharing_key(index, key)
        if key.account is not None and sharing.get(key.account, key.plan) != key.plan:
            what = f"account {shown(key.account)} has keys of plan {shown(sharing[key.account])}, too"
            yield _problem(index, "plan", what, "one plan for all keys of an account")


def _check_sharing_key(index: int, key: KeySettings) -> Iterator[SettingsProblem]:
    share = f'plan {shown(key.plan)} has share = "account"'
    if key.account is None:
        yield _problem(index, "account", "is missing", f"the key's account, since {share}")
    for name in ("requests", "units", "concurrent", "spending"):
        if getattr(key, name) is not None:
            yield _problem(index, name, f"is set, though {share}", "limits in the plan alone")


def _problem(index: int, name: str, what: str, expected: str = "") -> SettingsProblem:
    return SettingsProblem("", path_of(("keys", index, name)), what, expected)
