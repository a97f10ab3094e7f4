"""The client address: who a request without a known API key is counted by.

The peer's own address, unless the peer is a proxy that the settings trust: then the header that the
settings name is read from the right, past the proxies that are trusted too. Whatever a client writes
into that header stands to the left of what the first trusted proxy saw, so it never chooses the address.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any, NamedTuple

from ratelimit_mw._internal.policy.networks import Address, NetworkTable
from ratelimit_mw._internal.runtime.bounded import evict_oldest
from ratelimit_mw._internal.settings import AddressSettings, IdentitySettings
from ratelimit_mw._internal.settings.findings import Finding, say_once
from ratelimit_mw._internal.settings.values import IPNetwork

Scope = Mapping[str, Any]
"""An ASGI scope, which is only read here."""

MAX_HEADER = 8_192
"""Bytes of a forwarding header beyond which it is not read."""

MAX_HOPS = 64
"""Addresses in a forwarding header beyond which it is not read."""

UNIX = "unix"
"""The address of peers that have none: they came over a Unix socket."""

_MAX_HOSTS = 16_384
_MAX_LOOKS = 1_000
_MANY_CALLERS = 10
_LONGEST_ADDRESS = 128
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_TRANSLATED = (IPv6Network("64:ff9b::/96"), IPv6Network("64:ff9b:1::/48"), IPv6Network("::ffff:0:0:0/96"))
"""IPv4 addresses in their last 32 bits, as NAT64 writes them (RFC 6052, section 2.1), NAT64 within one
network (RFC 8215, taken to use a /96 of it) and SIIT (RFC 2765, section 2.1)."""
_PORT = re.compile(r"[0-9]{1,5}|_[A-Za-z0-9._-]+")
_ELEMENT = re.compile(r'(?:[^",]++|"(?:[^"\\]++|\\.)*+")*+', re.DOTALL)
_PAIR = re.compile(
    r"""[ \t]*([A-Za-z0-9!#$%&'*+.^_`|~-]+)=("(?:[^"\\]|\\.)*"|[^\s";,]+)[ \t]*(?:;|\Z)""", re.DOTALL
)


class AddressReader:
    """Reads the client address of a scope, as the `identity` table of the settings has it."""

    def __init__(self, identity: IdentitySettings, plans: Iterable[AddressSettings] = ()) -> None:
        """`plans` are the plans of callers by the networks that they call from; the last of one counts."""
        self._trusts_unix = UNIX in identity.trusted_proxies
        self._networks = [
            _by_bits(network) for network in identity.trusted_proxies if not isinstance(network, str)
        ]
        self._plans = NetworkTable([(each.network, each) for each in plans])
        self._blocked = NetworkTable([(network, network) for network in identity.blocked_networks])
        self._header = identity.forwarded_header
        self._name = identity.forwarded_header.lower().encode("latin-1")
        self.hops: dict[str, Hop | None] = {}
        """Addresses seen lately, as servers and proxies write them."""
        self.looks = _MAX_LOOKS
        """Number of further requests from strangers to search for signs of a proxy."""
        self.chains = _MAX_LOOKS
        """Number of further forwarded headers to examine for a balancer that appends its own address."""
        self._last_hop = ""
        self._hops_before: set[str] = set()

    def __call__(self, scope: Scope) -> str:
        """The text that the caller's address is counted under; see `Hop.text`."""
        return self.hop(scope).text

    def hop(self, scope: Scope) -> "Hop":
        """The caller's address: the peer's, or the one that trusted proxies tell."""
        client = scope.get("client")
        host: str | None = client[0] if client else None
        peer = (self.hops.get(host) or self._hop(host)) if host else Hop(UNIX, self._trusts_unix)
        if peer is not None and peer.trusted:
            return self._forwarded(scope, peer)
        if self.looks:
            self._look_for_proxy(scope, host)
        return Hop(canonical_address(host or UNIX)) if peer is None else peer

    def written(self, text: str) -> "Hop":
        """An address that somebody has written by hand, or as it is counted under."""
        hop = self._hop(text.removesuffix("/64")) or Hop("")
        return hop._replace(text=canonical_address(text))

    def _forwarded(self, scope: Scope, peer: "Hop") -> "Hop":
        """Return the address that the trusted proxies tell; the peer's if there is none or it makes no sense.

        What makes no sense may be a client's doing, so that it gets no plan of the proxy's network by it.
        """
        lines = self._lines(scope)
        header = ",".join(lines)
        if not header.strip(", \t"):
            say_once(_no_header(self._header))
            return peer
        client = None
        if len(header) <= MAX_HEADER:
            # Line by line: a quote that a client left open must not swallow what a proxy added below.
            by_line = self._name == b"forwarded"
            hops = (
                [hop for line in lines for hop in _forwarded_elements(line)] if by_line else header.split(",")
            )
            client = self._client(hops)
        return peer._replace(plan=None) if client is None else client

    def _lines(self, scope: Scope) -> list[str]:
        name = self._name
        return [value.decode("latin-1") for spelling, value in scope["headers"] if spelling.lower() == name]

    def _look_for_proxy(self, scope: Scope, host: str | None) -> None:
        """Among the first requests from strangers: do they come through a proxy that nobody trusted?"""
        self.looks -= 1
        header = ",".join(self._lines(scope))
        # Where the server itself has read the header, it names the peer, and all is well.
        if header and (host is None or host not in header):
            self.looks = 0
            say_once(_untrusted_proxy(self._header, canonical_address(host or UNIX)))
        elif header and host is not None and self.chains and len(header) <= MAX_HEADER:
            self._look_at_end(header.split(","), canonical_address(host))

    def _look_at_end(self, hops: list[str], counted: str) -> None:
        """Among the first requests: are many callers counted as the one address that ends each list?"""
        self.chains -= 1
        end = self._hop(hops[-1])
        if len(hops) < 2 or end is None or end.text != counted or self._last_hop not in ("", counted):
            self.chains = 0  # callers are told apart
            return
        self._last_hop = counted
        self._hops_before.add(hops[-2].strip(" \t")[:_LONGEST_ADDRESS])
        if len(self._hops_before) >= _MANY_CALLERS:
            self.chains = 0
            say_once(_balancer_appended(self._header, counted))

    def _client(self, hops: list[str]) -> "Hop | None":
        """The first address from the right that is not trusted, else the left-most."""
        hop = None
        for hop_text in hops[: -MAX_HOPS - 1 : -1]:
            hop = self._hop(hop_text)
            if hop is None:
                return None
            if not hop.trusted:
                if self.chains:
                    self._look_at_end(hops, hop.text)
                return hop
        return hop if len(hops) <= MAX_HOPS else None

    def _hop(self, text: str) -> "Hop | None":
        """An address as a server or a proxy writes it, or None where it is none."""
        try:
            return self.hops[text]
        except KeyError:
            pass
        address = _parse(text)
        hop = None
        if address is not None:
            hop = self._found(address)
        if len(text) <= _LONGEST_ADDRESS:
            evict_oldest(self.hops, _MAX_HOSTS)
            self.hops[text] = hop
        return hop

    def _found(self, address: Address) -> "Hop":
        trusted = any(address in network for network in self._networks)
        carried = None if isinstance(address, IPv4Address) else _carried(address)
        ways = (address,) if carried is None else (address, carried)
        hop = Hop(_counted(address), trusted, blocked=self._blocked.find(*ways))
        entry = self._plans.find(*ways)
        return hop if entry is None else hop._replace(plan=entry.plan, network=entry.network)


def canonical_address(text: str) -> str:
    """The text that an address, however written, is counted under; the same again for such a text.

    IPv6 by /64, since one subscriber holds at least that much, unless it carries an IPv4 address. Names that
    are not addresses, such as those of test clients, become `peer:<name>`, hashed where they are long or hold
    unusual characters.
    """
    if text == UNIX:
        return UNIX
    address = _parse(text.removesuffix("/64"))
    if address is not None:
        is_network = text.endswith("/64") and isinstance(address, IPv6Address)
        return _network(address) if is_network else _counted(address)
    name = text.removeprefix("peer:")
    if not _PLAIN_NAME.fullmatch(name):
        name = "sha256-" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return f"peer:{name}"


class Hop(NamedTuple):
    """A client, a peer or a proxy, and what the settings say of its address."""

    text: str
    """The text that callers there are counted under: `192.0.2.1`, `2001:db8:1:2::/64`, `unix`, or
    `peer:<name>` where the server knows no more than a name."""
    trusted: bool = False
    """Whether it is believed what it says of who came before it."""
    plan: str | None = None
    """The plan of the network that it is in; None where it is in none."""
    network: IPNetwork | None = None
    """The network that has this plan."""
    blocked: IPNetwork | None = None
    """The blocked network that it is in; None where it is in none."""

    @property
    def address_key(self) -> tuple[str, str | None]:
        """All of it that limits depend on: of one /64 some addresses may have a plan of their own."""
        return self.text, self.plan


def _counted(address: Address) -> str:
    carried = address if isinstance(address, IPv4Address) else _carried(address)
    return _network(address) if carried is None else str(carried)


def _network(address: Address) -> str:
    return str(IPv6Network((int(address) >> 64 << 64, 64)))


def _carried(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that a translator or a tunnel has put into an IPv6 one, None for any other.

    Only where answers reach none but the holder of that IPv4 address, so that nobody can choose it. All who
    come through one translator or Teredo server share a /64; a 6to4 site has 65,536 of them.
    """
    if address.teredo is not None:
        return address.teredo[1]
    low = IPv4Address(int(address) & 0xFFFF_FFFF)
    if int(low) and any(address in network for network in _TRANSLATED):
        return low
    return address.sixtofour


def _parse(text: str) -> Address | None:
    """`192.0.2.1`, `2001:db8::1`, each also with a port, as `192.0.2.1:80` and `[2001:db8::1]:80`."""
    host = text.strip(" \t")
    if len(host) > _LONGEST_ADDRESS:
        return None
    port = None
    if host.startswith("["):
        host, bracket, rest = host[1:].partition("]")
        if not bracket or ":" not in host or (rest and not rest.startswith(":")):
            return None
        port = rest[1:] if rest else None
    elif host.count(":") == 1:
        host, _, port = host.partition(":")
    if port is not None and not _PORT.fullmatch(port):
        return None
    try:
        address = ip_address(host)
    except ValueError:
        return None
    if isinstance(address, IPv6Address):
        # By bits, not by spelling; and never into one /64, which would hold all of IPv4.
        return address.ipv4_mapped or address
    return address


def _by_bits(network: IPv4Network | IPv6Network) -> IPv4Network | IPv6Network:
    """A network of IPv4-mapped addresses as the IPv4 network that it is."""
    first = network.network_address
    if isinstance(first, IPv6Address) and first.ipv4_mapped is not None and network.prefixlen >= 96:
        return IPv4Network((first.ipv4_mapped, network.prefixlen - 96))
    return network


def _forwarded_elements(header: str) -> list[str]:
    """Return the `for` value of each element of a `Forwarded` header (RFC 7239, section 4), "" for none."""
    hops = []
    at = -1
    while at < len(header):
        element = _ELEMENT.match(header, at + 1)
        if element is None or header[element.end() : element.end() + 1] not in {"", ","}:
            return [""]  # a quote that never ends: nothing can be told apart
        hops.append(_for_value(element.group()))
        at = element.end()
    return hops


def _for_value(element: str) -> str:
    values = []
    at = 0
    while at < len(element):
        pair = _PAIR.match(element, at)
        if pair is None:
            return ""
        if pair[1].lower() == "for":
            values.append(pair[2])
        at = pair.end()
    if len(values) != 1:
        return ""
    value = values[0]
    return re.sub(r"\\(.)", r"\1", value[1:-1]) if value.startswith('"') else value


def _no_header(header: str) -> Finding:
    text = (
        f"a trusted proxy sent no {header} header: its callers are counted together, by the proxy's "
        "address. Make the proxy set this header, or name the header that it does set in "
        "identity.forwarded_header."
    )
    return Finding("missing-forwarded-header", text)


def _untrusted_proxy(header: str, peer: str) -> Finding:
    text = (
        f"{header} came from {peer}, which identity.trusted_proxies does not name. If {peer} is your proxy, "
        "name it there: now all its callers are counted together, by its address. If it is a client, nothing "
        "is wrong."
    )
    return Finding("untrusted-proxy", text)


def _balancer_appended(header: str, address: str) -> Finding:
    text = (
        f"all callers are counted as {address}, the last address in {header} of many clients: a balancer "
        "appends its own address. Name it in identity.trusted_proxies, too. If one client writes the "
        "header itself, nothing is wrong."
    )
    return Finding("balancer-appended", text)
