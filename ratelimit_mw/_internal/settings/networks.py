"""`[[addresses]]` in the settings: plans of callers by the networks that they call from."""

from collections.abc import Iterator, Mapping

from ratelimit_mw._internal.settings.errors import SettingsProblem, path_of
from ratelimit_mw._internal.settings.keys import unknown_plan
from ratelimit_mw._internal.settings.values import IPNetwork, Network, PlanName, Table


class AddressSettings(Table):
    """`[[addresses]]`: the plan of callers who are counted by an address in a network."""

    network: Network
    """A network or a single address. Of several networks that hold an address, the one with the longest
    prefix counts."""
    plan: PlanName
    """The plan of these callers, in place of `identity.anonymous_plan`."""


def check_addresses(
    addresses: Mapping[int, AddressSettings], plans: Mapping[str, object]
) -> Iterator[SettingsProblem]:
    """Yield networks that are listed twice, and plans that don't exist."""
    first: dict[IPNetwork, int] = {}
    for index, entry in addresses.items():
        other = first.setdefault(entry.network, index)
        if other != index:
            what = f"{entry.network} is the same network as {path_of(('addresses', other, 'network'))}"
            yield SettingsProblem("", path_of(("addresses", index, "network")), what, "each network once")
        if plans and entry.plan not in plans:
            yield unknown_plan(("addresses", index, "plan"), entry.plan, plans)
