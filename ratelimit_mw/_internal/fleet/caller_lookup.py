"""Lookup of the callers counted under a partition: keys set live or listed, else callers seen by workers.

A partition is also a caller's name, which is shown everywhere. An API key that draws on the counts of its
account has a name of its own, too.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from heapq import nsmallest
from itertools import chain
from typing import TYPE_CHECKING

from ratelimit_mw._internal.fleet.reading import SeenCaller
from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.policy.identity import HASH, Identity, account_partition, key_partition
from ratelimit_mw._internal.runtime import threads

if TYPE_CHECKING:
    from ratelimit_mw._internal.live.rules import Rules


class CallerLookup:
    """Finds the identities of partitions."""

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter
        self._rules: Rules | None = None
        self._follows = False
        """Whether `follow` is called often enough."""
        self._by_name: dict[str, str] = {}
        self._labels: dict[str, str] = {}
        self._accounts: dict[str, str] = {}
        self._by_account: dict[str, list[str]] = {}
        self._seen: Mapping[str, SeenCaller] = {}

    async def follow(self) -> None:
        """Learn the keys in force beside the event loop; until then those from before are told of."""
        rules, self._follows = self._limiter.engine.live.rules, True
        if self._rules is not rules:
            await threads.call(partial(self._learn_keys, rules))

    def learn(self, seen: Mapping[str, SeenCaller]) -> None:
        """Take note of who was seen last."""
        self._seen = seen

    def identity(self, partition: str) -> Identity | None:
        """Return the identity that a partition counts; None if nobody can tell its plan."""
        known = self._known(partition)
        if known:
            return known[0]
        seen = self._seen.get(partition, SeenCaller())
        plan = self._network_plan(partition) or seen.plan or self._assumed_plan(partition)
        if plan is None:
            return None
        return self.of_plan(partition, plan)

    def of_plan(self, partition: str, plan: str) -> Identity:
        """The caller who is counted so, as one of a plan that is not asked about."""
        seen = self._seen.get(partition, SeenCaller())
        kind, _, rest = partition.partition(":")
        address = rest if kind == "ip" and self._limiter.settings.identity.per_address else None
        return Identity(
            partition, plan, _hash_of(partition, seen), seen.account, address, counted_as=partition
        )

    def hashes(self, partition: str) -> tuple[str, ...]:
        """Hashes of the API keys that are counted so, as far as they are known."""
        known = self._known(partition)
        if not known and (identity := self.identity(partition)) is not None:
            known = [identity]
        return tuple(each.api_key_hash for each in known if each.api_key_hash is not None)

    def label(self, partition: str) -> str | None:
        """The label of a key, or the one that all labelled keys of an account have; None for any other."""
        labels = {self._labels[each] for each in self.key_hashes(partition) if each in self._labels}
        return labels.pop() if len(labels) == 1 else None

    def key_hashes(self, name: str) -> list[str]:
        """Hashes of the keys of this name that are set live or listed: one key, or those of an account."""
        self._go_by_rules()
        if name in self._by_name:
            return [self._by_name[name]]
        return list(self._by_account.get(name, ()))

    def counted_as(self, name: str) -> list[str]:
        """The partitions that a known key or account is counted under; the name itself of anybody else."""
        identify = self._limiter.engine.live.rules.identify
        found = [identify.of_key(each) for each in self.key_hashes(name)]
        return list(dict.fromkeys(each.partition for each in found if each is not None)) or [name]

    def is_known(self, name: str) -> bool:
        """Whether a caller or a key of this name is set live, listed, or was seen lately by a worker."""
        return bool(self.key_hashes(name)) or name in self._seen

    def names(self, start: str, number: int) -> list[str]:
        """The first names that begin with a text, of those for which `is_known` holds."""
        return nsmallest(number, {each for each in self._names() if each.startswith(start)})

    def search(self, text: str, number: int) -> list[str]:
        """The first names of those whose name, label, account or whole hash has a text in it.

        Takes as long as there are keys: not for an event loop.
        """
        self._go_by_rules()
        wanted = text.strip().rstrip("…").casefold()
        found: list[str] = []
        for name in dict.fromkeys(self._names()):
            if wanted in name.casefold() or any(wanted in each.casefold() for each in self._texts(name)):
                found.append(name)
                if len(found) == number:
                    break
        return found

    def account(self, name: str) -> str | None:
        """The account of a key, or of keys that are counted together."""
        hashes = self.key_hashes(name)
        return self._accounts.get(hashes[0]) if hashes else self._seen.get(name, SeenCaller()).account

    def _texts(self, name: str) -> Iterator[str]:
        """Yield the texts, besides the name itself, by which a search finds a name."""
        hashes = self.key_hashes(name)
        for each in hashes:
            yield each
            yield self._labels.get(each, "")
        yield self.account(name) or ""
        yield self._seen.get(name, SeenCaller()).api_key_hash or ""

    def _names(self) -> Iterator[str]:
        self._go_by_rules()
        yield from self._by_name
        yield from self._by_account
        yield from self._seen

    def _known(self, partition: str) -> list[Identity]:
        """The keys that are set live or listed and counted so."""
        identify = self._limiter.engine.live.rules.identify
        found = [identify.of_key(each) for each in self.key_hashes(partition)]
        return [each for each in found if each is not None and each.partition == partition]

    def _go_by_rules(self) -> None:
        rules = self._limiter.engine.live.rules
        if self._rules is not rules and not (self._follows and self._rules is not None):
            self._learn_keys(rules)

    def _learn_keys(self, rules: "Rules") -> None:
        """Index the keys by partition. There may be very many keys, so that no identities are made here."""
        by_name: dict[str, str] = {}
        labels: dict[str, str] = {}
        accounts: dict[str, str] = {}
        by_account: dict[str, list[str]] = {}
        listed = [key for key in rules.settings.keys if key.hash not in rules.registered]
        for key in threads.in_pieces(chain(listed, rules.registered.values()), 500):
            by_name[key_partition(key.hash)] = key.hash
            if key.label is not None:
                labels[key.hash] = key.label
            if key.account is not None:
                accounts[key.hash] = key.account
                by_account.setdefault(account_partition(key.account), []).append(key.hash)
        self._rules, self._by_name, self._by_account = rules, by_name, by_account
        self._labels, self._accounts = labels, accounts

    def _network_plan(self, partition: str) -> str | None:
        """The plan of the network that an address is in."""
        kind, _, rest = partition.partition(":")
        return self._limiter.engine.identify.hop_at(rest).plan if kind == "ip" else None

    def _assumed_plan(self, partition: str) -> str | None:
        """The plan of whom no worker has told of lately."""
        identity = self._limiter.settings.identity
        kind = partition.partition(":")[0]
        return {"k": identity.default_plan, "ip": identity.anonymous_plan}.get(kind)


def _hash_of(partition: str, seen: SeenCaller) -> str | None:
    """The hash of a key that is counted alone, where it fits: others may have written it."""
    text = seen.api_key_hash or ""
    return text if HASH.fullmatch(text) and partition == key_partition(text) else None
