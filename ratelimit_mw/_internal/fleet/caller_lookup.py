"""Who is counted under a partition: the keys that are set live or listed, else what workers say."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ratelimit_mw._internal.fleet.reading import Seen
from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.policy.identity import HASH, Identity, account_partition

if TYPE_CHECKING:
    from ratelimit_mw._internal.live.rules import Rules


class CallerLookup:
    """Finds the identities of partitions."""

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter
        self._rules: Rules | None = None
        self._by_digits: dict[str, str] = {}
        self._by_account: dict[str, list[str]] = {}
        self._seen: Mapping[str, Seen] = {}

    def learn(self, seen: Mapping[str, Seen]) -> None:
        """Take note of who was seen last."""
        self._seen = seen

    def identity(self, partition: str) -> Identity | None:
        """Who is counted so; None where nobody can tell the plan."""
        known = self._known(partition)
        if known:
            return known[0]
        seen = self._seen.get(partition, Seen())
        plan = seen.plan or self._assumed_plan(partition)
        if plan is None:
            return None
        kind, _, rest = partition.partition(":")
        address = rest if kind == "ip" and self._limiter.settings.identity.per_address else None
        return Identity(partition, plan, _hash_of(partition, seen), seen.account, address)

    def hashes(self, partition: str) -> tuple[str, ...]:
        """Hashes of the API keys that are counted so, as far as they are known."""
        known = self._known(partition)
        if not known and (identity := self.identity(partition)) is not None:
            known = [identity]
        return tuple(each.api_key_hash for each in known if each.api_key_hash is not None)

    def _known(self, partition: str) -> list[Identity]:
        """The keys that are set live or listed and counted so."""
        rules = self._limiter.live.rules
        if self._rules is not rules:
            self._learn_keys(rules)
        kind, _, rest = partition.partition(":")
        if kind == "k":
            hashes = [self._by_digits[rest]] if rest in self._by_digits else []
        else:
            hashes = self._by_account.get(partition, [])
        found = [rules.identify.of_key(each) for each in hashes]
        return [each for each in found if each is not None and each.partition == partition]

    def _learn_keys(self, rules: "Rules") -> None:
        """Where to look a partition up. There may be very many keys, so that nothing is made of them here."""
        keys = [*rules.registered.values(), *rules.settings.keys]
        self._rules, self._by_account = rules, {}
        self._by_digits = {_digits(key.hash): key.hash for key in keys}
        for key in keys:
            if key.account is not None:
                self._by_account.setdefault(account_partition(key.account), []).append(key.hash)

    def _assumed_plan(self, partition: str) -> str | None:
        """The plan of whom no worker has told of lately."""
        identity = self._limiter.settings.identity
        kind = partition.partition(":")[0]
        return {"k": identity.default_plan, "ip": identity.anonymous_plan}.get(kind)


def _hash_of(partition: str, seen: Seen) -> str | None:
    """The hash of a key that is counted alone, where it fits: others may have written it."""
    text = seen.api_key_hash or ""
    return text if HASH.fullmatch(text) and partition == f"k:{_digits(text)}" else None


def _digits(api_key_hash: str) -> str:
    return api_key_hash.partition(":")[2][:32]
