"""Networks by the addresses in them: of several that hold an address, the one with the longest prefix."""

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address
from typing import Generic, TypeVar

from ratelimit_mw._internal.settings.values import IPNetwork

Address = IPv4Address | IPv6Address
T = TypeVar("T")

_IPV4 = 4
_BEFORE_IPV4 = 96
"""Bits that an IPv4 address has before it where an IPv6 one carries it."""


class NetworkTable(Generic[T]):
    """A value for each network. A look-up takes as long as there are different lengths of prefixes."""

    def __init__(self, entries: Iterable[tuple[IPNetwork, T]] = ()) -> None:
        """Take networks with their values; of one network that comes twice, the last value."""
        found: dict[tuple[int, int], dict[int, T]] = {}
        for network, value in entries:
            kind = (network.version, network.prefixlen)
            found.setdefault(kind, {})[int(network.network_address)] = value
        self._lengths = sorted(found.items(), key=lambda each: _length(*each[0]), reverse=True)

    def __bool__(self) -> bool:
        return bool(self._lengths)

    def find(self, *addresses: Address) -> T | None:
        """The value of the smallest network that holds one of the ways to write an address."""
        for (version, length), values in self._lengths:
            for address in addresses:
                if address.version == version:
                    rest = address.max_prefixlen - length
                    number = int(address) >> rest << rest
                    if number in values:
                        return values[number]
        return None


def _length(version: int, length: int) -> int:
    """Length of a prefix, by which IPv4 networks are compared with IPv6 ones."""
    return length + _BEFORE_IPV4 if version == _IPV4 else length
