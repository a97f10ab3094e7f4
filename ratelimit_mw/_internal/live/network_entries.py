"""Entries of networks among the live ones: plans of callers by the network that they call from."""

from collections.abc import Mapping
from dataclasses import fields

from pydantic_core import PydanticCustomError

from ratelimit_mw._internal.policy.identity import HASH, key_partition
from ratelimit_mw._internal.policy.key_entry import KeyEntry
from ratelimit_mw._internal.settings import AddressSettings, Settings, SettingsProblem
from ratelimit_mw._internal.settings.keys import unknown_plan
from ratelimit_mw._internal.settings.values import IPNetwork, parse_network

_OF_KEYS = [field.name for field in fields(KeyEntry) if field.name not in ("plan", "label")]


def network_of(name: str) -> IPNetwork | None:
    """The network that an entry of this name is for; None for an entry of a key, and for any other text."""
    if "/" not in name or not name.isascii():
        return None
    try:
        network = parse_network(name)
    except PydanticCustomError:
        return None
    return network if str(network) == name else None


def network_at(caller: str) -> str | None:
    """The name of the entry for the network of a caller who is counted by address; None for any other."""
    kind, _, address = caller.partition(":")
    try:
        return str(parse_network(address)) if kind == "ip" else None
    except PydanticCustomError:
        return None


def shown_name(name: str) -> str:
    """The name of an entry's caller or network, unless it is neither: it may be a key in the clear."""
    if HASH.fullmatch(name):
        return key_partition(name)
    return "(not a hash)" if network_of(name) is None else name


def sound_networks(
    entries: Mapping[str, KeyEntry], settings: Settings
) -> tuple[list[AddressSettings], dict[str, list[SettingsProblem]]]:
    """Return the networks that can be used under these settings, and the problems of the others by name."""
    sound: list[AddressSettings] = []
    wrong: dict[str, list[SettingsProblem]] = {}
    for name, entry in entries.items():
        network = network_of(name)
        if network is None:
            continue
        problems = [
            SettingsProblem("", each, "can't be set for a network", "a plan and a label alone")
            for each in _OF_KEYS
            if getattr(entry, each) is not None
        ]
        if entry.plan not in settings.plans:
            problems.append(unknown_plan(("plan",), str(entry.plan), settings.plans))
        if problems:
            wrong[name] = problems
        else:
            sound.append(AddressSettings(network=network, plan=entry.plan))
    return sound, wrong
