"""Live keys that the settings allow, kept up to date change by change."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

from ratelimit_mw._internal.live.key_entries import contradictions, fitting_key
from ratelimit_mw._internal.policy.key_entry import KeyEntry
from ratelimit_mw._internal.runtime.layered import Layered
from ratelimit_mw._internal.runtime.threads import in_pieces
from ratelimit_mw._internal.settings import KeySettings, Settings, SettingsError, SettingsProblem

TOGETHER = 64
"""Keys without accounts that are checked in one piece."""


class SoundKeys:
    """Checks live keys against one state of the settings, and has those that can be used.

    A key can contradict other keys of its account only: so a change of one has few others checked.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.keys: Layered[KeySettings] = Layered()
        """The keys that can be used, by hash. Replaced, never changed."""
        self._refused: dict[str, KeySettings] = {}
        """Keys that are valid by themselves, and contradict others of their account."""
        self._wrong: dict[str, list[SettingsProblem]] = {}
        self._accounts: dict[str, set[str]] = {}
        """Hashes of the live keys that belong to an account."""
        self._listed = {key.hash: key for key in settings.keys}
        self._listed_of: dict[str, list[KeySettings]] = {}
        for key in settings.keys:
            if key.account is not None:
                self._listed_of.setdefault(key.account, []).append(key)

    @property
    def problems(self) -> Mapping[str, list[SettingsProblem]]:
        """The problems of the keys that can't be used, by hash."""
        return self._wrong

    def update(self, entries: Mapping[str, KeyEntry], hashes: Iterable[str]) -> None:
        """Check the keys with these hashes again, and the other keys of their accounts."""
        keys: dict[str, KeySettings | None] = {}
        accounts: dict[str, None] = {}
        for api_key_hash in in_pieces(hashes):
            before = self._known(api_key_hash)
            self._wrong.pop(api_key_hash, None)
            now = keys[api_key_hash] = self._made(entries.get(api_key_hash), api_key_hash)
            for key in (before, now, self._listed.get(api_key_hash)):
                if key is not None and key.account is not None:
                    accounts[key.account] = None
            if before is not None and before.account is not None:
                self._accounts[before.account].discard(api_key_hash)
            if now is not None and now.account is not None:
                self._accounts.setdefault(now.account, set()).add(api_key_hash)
        changed: dict[str, KeySettings | None] = {each: None for each, key in keys.items() if key is None}
        for each in changed:
            self._refused.pop(each, None)
        for together, listed in in_pieces(self._groups(keys, accounts), 1):
            changed |= self._checked(together, listed)
        self.keys = self.keys.with_changes(changed)

    def _known(self, api_key_hash: str) -> KeySettings | None:
        """Return a live key that is valid by itself, whether it contradicts others or not."""
        return self.keys.get(api_key_hash) or self._refused.get(api_key_hash)

    def _fitting(self, api_key_hash: str, changed: Mapping[str, KeySettings | None]) -> KeySettings | None:
        """Return the key that will be valid by itself after these changes."""
        return changed[api_key_hash] if api_key_hash in changed else self._known(api_key_hash)

    def _made(self, entry: KeyEntry | None, api_key_hash: str) -> KeySettings | None:
        if entry is None:
            return None
        try:
            return fitting_key(entry, api_key_hash, self.settings)
        except SettingsError as error:
            self._wrong[api_key_hash] = list(error.problems)
            return None

    def _groups(
        self, keys: Mapping[str, KeySettings | None], accounts: Iterable[str]
    ) -> Iterator[tuple[dict[str, KeySettings], list[KeySettings]]]:
        """Yield keys to check together, by hash, and the keys of the file to check them with."""
        alone = iter([each for each, key in keys.items() if key is not None and key.account is None])
        while some := tuple(islice(alone, TOGETHER)):
            yield {each: key for each in some if (key := keys[each]) is not None}, []
        together: dict[str, KeySettings] = {}
        listed: list[KeySettings] = []
        for account in accounts:
            # In one order in every process: of two that contradict each other, all refuse the same.
            hashes = sorted(self._accounts.get(account, ()))
            together |= {each: key for each in hashes if (key := self._fitting(each, keys)) is not None}
            of_file = self._listed_of.get(account, ())
            listed += [each for each in of_file if self._fitting(each.hash, keys) is None]
            if len(together) + len(listed) >= TOGETHER:
                yield together, listed
                together, listed = {}, []
        yield together, listed

    def _checked(
        self, together: Mapping[str, KeySettings], listed: Iterable[KeySettings]
    ) -> dict[str, KeySettings | None]:
        found: dict[str, list[SettingsProblem]] = {}
        for api_key_hash, problem in contradictions(together, listed, self.settings):
            found.setdefault(api_key_hash, []).append(problem)
        for each, key in together.items():
            if each in found:
                self._refused[each], self._wrong[each] = key, found[each]
            else:
                self._refused.pop(each, None)
                self._wrong.pop(each, None)
        return {each: None if each in found else key for each, key in together.items()}
