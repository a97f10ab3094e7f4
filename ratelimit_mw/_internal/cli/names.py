"""Callers by the name that is shown of them everywhere, such as `k:` and hex digits, or a prefix of it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ratelimit_mw._internal.backends.figures_store import FiguresQuery
from ratelimit_mw._internal.cli.output import CommandError
from ratelimit_mw._internal.fleet.caller_lookup import CallerLookup
from ratelimit_mw._internal.fleet.reading import seen_callers
from ratelimit_mw._internal.limiter.inspect_caller import overview
from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.live.network_entries import shown_name
from ratelimit_mw._internal.live.timed_entries import TimedEntry, time_text
from ratelimit_mw._internal.model.backend import BackendError
from ratelimit_mw._internal.policy.client_address import canonical_address
from ratelimit_mw._internal.policy.decision import Decision
from ratelimit_mw._internal.policy.identity import Identity, account_partition
from ratelimit_mw._internal.settings import KeySettings

NAME = re.compile(r"(k|a|ah|ip|i|l):.*", re.DOTALL)
"""A text that is a caller's name or the beginning of one, and never an API key."""
MIN_DIGITS = 6
"""The shortest prefix that names a caller, without its kind."""
_HEX_KINDS = ("k", "ah", "i", "l")
_SHOWN = 4
"""Callers that an error names."""


@dataclass(frozen=True, slots=True)
class Caller:
    """A caller, and why it has its plan."""

    identity: Identity
    why: str
    """Source of the caller's plan, as text."""
    label: str | None = None


def is_name(text: str) -> bool:
    """Whether a text has the form in which callers are shown."""
    return NAME.fullmatch(text) is not None


class Directory:
    """Everybody whom the settings, the live keys, the workers or the counts of the backend know."""

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter
        self._lookup = CallerLookup(limiter)

    async def read(self) -> None:
        """Learn the live keys, and whom workers have told of lately. Raises `BackendError`."""
        if not self._limiter.settings.backend.is_shared:
            return
        await self._limiter.engine.live.read_keys()
        store = self._limiter.engine.reporter.store
        try:
            reading = await store.read(FiguresQuery((), (), 0.0))
        finally:
            await store.close()
        self._lookup.learn(seen_callers(reading.identities))

    def keys(self) -> dict[str, tuple[str, KeySettings]]:
        """Return each known key by its hash, with its source: `live`, or a path in the file."""
        keys = {key.hash: (f"keys[{index}]", key) for index, key in enumerate(self._limiter.settings.keys)}
        registered = self._limiter.engine.live.rules.registered
        return keys | {each: (self._live_source(each), key) for each, key in registered.items()}

    def _live_source(self, name: str) -> str:
        """The source `live` of an entry, with its end if it goes back by itself."""
        entry = self._limiter.engine.live.in_force.get(name)
        return f"live until {time_text(entry.until)}" if isinstance(entry, TimedEntry) else "live"

    def source_of_network(self, address: str) -> str:
        """The entry that gives an address its plan: `live`, or a path in the file; "" for none."""
        engine = self._limiter.engine
        network = engine.identify.hop_at(address).network if address else None
        if network is None:
            return ""
        listed = [each.network for each in self._limiter.settings.addresses]
        if network in [each.network for each in engine.live.rules.networks]:
            return f"{self._live_source(str(network))}: {network}"
        return f"addresses[{listed.index(network)}]: {network}"

    def label(self, name: str) -> str | None:
        """The label of a key or of an account's keys."""
        return self._lookup.label(name)

    def starting_with(self, text: str, number: int) -> list[tuple[str, str]]:
        """The first names of known callers that begin with a text, each with its label or account."""
        keys = self.keys()
        found = []
        for name in self._lookup.names(text, number):
            hashes = self._lookup.key_hashes(name)
            account = keys[hashes[0]][1].account if hashes else None
            found.append((name, self._lookup.label(name) or account or ""))
        return found

    async def callers(self, text: str) -> list[Caller]:
        """Return the callers that a name or a prefix of a name stands for.

        The result is one caller, or one caller for each key of an account whose keys are counted apart.
        Raises `CommandError`, `BackendError`.
        """
        name = _whole(text)
        if not self._lookup.is_known(name):
            counted = await self._by_counts(name)
            if counted is not None:
                return [counted]
            if _is_whole_address(text):
                return [self.at_address(name.removeprefix("ip:"))]
            name = self._by_prefix(text, name)
        return self._known(name)

    def at_address(self, address: str) -> Caller:
        """The caller without an API key at an address, whether it was ever seen or not."""
        source = self.source_of_network(address) or "identity.anonymous_plan"
        return Caller(self._limiter.engine.identify.of_address(address), f"no API key: {source}")

    def hashes(self, text: str) -> list[str]:
        """Hashes of the API keys that a name or a prefix stands for. Raises `CommandError`."""
        name = _whole(text)
        ignored = self._ignored(name)
        if not ignored and not self._lookup.is_known(name) and not _is_whole_address(text):
            name = self._by_prefix(text, name)
        hashes = [*self._lookup.key_hashes(name), *ignored]
        if hashes:
            return hashes
        if not name.startswith("k:"):
            raise CommandError(f"{name} is neither an API key nor an account of known keys")
        identity = self._lookup.identity(name)
        if identity is None or identity.api_key_hash is None:
            raise CommandError(f"{name}: only the beginning of this key's hash is known; give the key itself")
        return [identity.api_key_hash]

    def account(self, text: str, api_key_hash: str) -> str | None:
        """The account of a key, where the text that stood for the key is an account's name."""
        if not text.startswith(("a:", "ah:")):
            return None
        live = self._limiter.engine.live.in_force.get(api_key_hash)
        return self.keys()[api_key_hash][1].account if live is None else live.account

    def _ignored(self, name: str) -> list[str]:
        """Hashes of keys of this name that are set live, and that no worker goes by: they don't fit."""
        live = self._limiter.engine.live
        return [
            each
            for each, entry in live.in_force.items()
            if each not in live.rules.registered
            and (name == shown_name(each) or (entry.account and name == account_partition(entry.account)))
        ]

    def _known(self, name: str) -> list[Caller]:
        keys, found = self.keys(), dict[str, Caller]()
        for each in self._lookup.key_hashes(name):
            source, key = keys[each]
            identity = self._limiter.engine.identify.of_key(key.hash)
            if identity is not None:
                label = self._lookup.label(identity.partition)
                found.setdefault(identity.partition, Caller(identity, source, label))
        if found:
            return list(found.values())
        identity = self._lookup.identity(name)
        if identity is None or identity.plan not in self._limiter.settings.plans:
            plan = None if identity is None else identity.plan
            raise CommandError(f"{name} was seen with the plan {plan!r}, which the settings don't have")
        address = name.partition(":")[2] if name.startswith("ip:") else ""
        return [Caller(identity, self.source_of_network(address) or "as a worker reported lately")]

    async def _by_counts(self, name: str) -> Caller | None:
        """A caller of whom nothing is known but what is counted of it; None where nothing is."""
        found: list[tuple[int, Caller]] = []
        if _could_be_whole(name):
            for plan, why in self._assumed(name):
                identity = self._lookup.of_plan(name, plan)
                decision = await overview(self._limiter, identity)
                found.append((_used(decision), Caller(identity, why)))
        used, caller = max(found, key=lambda each: each[0], default=(0, None))
        return caller if used else None

    def _assumed(self, name: str) -> Iterable[tuple[str, str]]:
        """The plans that such a caller may have, the likeliest first."""
        identity = self._limiter.settings.identity
        kind, _, rest = name.partition(":")
        assumed = {"k": (identity.default_plan, "identity.default_plan")}.get(kind)
        if kind == "ip":
            plan = self._limiter.engine.identify.of_address(rest).plan
            assumed = (plan, self.source_of_network(rest) or "identity.anonymous_plan")
        first = [assumed] if assumed else []
        others = [plan for plan in self._limiter.settings.plans if not assumed or plan != assumed[0]]
        return [*first, *((plan, "a guess from its counts") for plan in others)]

    def _by_prefix(self, text: str, start: str) -> str:
        rest = start.partition(":")[2]
        names = self._lookup.names(start, _SHOWN + 1) if len(rest) >= MIN_DIGITS else []
        if len(names) == 1:
            return names[0]
        if names:
            shown = ", ".join(self._shown(name) for name in names[:_SHOWN])
            more = ", …" if len(names) > _SHOWN else ""
            raise CommandError(f"{text} stands for several callers: {shown}{more}")
        short = f"; a prefix has at least {MIN_DIGITS} digits" if len(rest) < MIN_DIGITS else ""
        raise CommandError(
            f"{text}: no caller who is known or has counts has this name{short}. "
            f"For an API key that itself begins with {start.partition(':')[0]}:, give its hash"
        )

    def _shown(self, name: str) -> str:
        label = self._lookup.label(name)
        return f"{name} ({label})" if label else name


async def open_directory(limiter: Limiter, *, needed: bool = True) -> tuple[Directory, str | None]:
    """A directory that has read what it can, and why it could read nothing where that is not `needed`.

    Raises `BackendError`.
    """
    directory = Directory(limiter)
    try:
        await directory.read()
    except BackendError as error:
        if needed:
            raise
        return directory, f"the backend is away ({error})"
    return directory, None


def _whole(text: str) -> str:
    """A name as callers have it: the mark of a shortened name taken off, hex digits in small letters."""
    kind, _, rest = text.strip().rstrip("…").partition(":")
    if kind == "ip":
        address = canonical_address(rest)
        return f"ip:{rest if address.startswith('peer:') else address}"
    return f"{kind}:{rest.lower() if kind in _HEX_KINDS else rest}"


def _is_whole_address(text: str) -> bool:
    """Whether a name is that of one address, and so never the beginning of another's."""
    kind, _, rest = text.strip().partition(":")
    return kind == "ip" and not canonical_address(rest).startswith("peer:")


def _could_be_whole(name: str) -> bool:
    kind, _, rest = name.partition(":")
    return bool(rest) and (kind not in _HEX_KINDS or re.fullmatch(r"[0-9a-f]{32}", rest) is not None)


def _used(decision: Decision) -> int:
    """Return the number of limits of which something is counted."""
    return sum(each.remaining < each.limit for each in decision.limits)
