"""Answers that cannot be: nobody waits for ever, nobody is told nonsense, and it is one outage."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import hiredis
import pytest

from ratelimit_mw._internal.backends import open_figures_store, open_key_store
from ratelimit_mw._internal.backends.cluster.backend import ClusterBackend
from ratelimit_mw._internal.backends.figures_store import FiguresQuery, FiguresStore, Report
from ratelimit_mw._internal.backends.key_store import KeyStore
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.model.backend import BackendError, EstimateAction, Settlement
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.limits import Window
from ratelimit_mw._internal.settings import BackendSettings
from ratelimit_mw._internal.settings.url import SecretURL
from tests.integration.test_sentinel import sentinels  # noqa: F401 - a fixture
from tests.support.conformance import daily, eventually, new_id, slots, window
from tests.support.processes import HOST
from tests.support.proxy import Proxy
from tests.support.servers import StoreServer
from tests.support.statuses import peeked
from tests.support.topologies import SERVICE, Cluster, Sentinels

pytestmark = pytest.mark.rerun

TIMEOUT = 5.0
CHARGES = {
    "alone": [Charge([window(99_999), slots(999)])],
    "as one": [Charge([window(99_999), slots(999)])] * 3,
    "several": [Charge([window(99_999, of=name), slots(999, of=name)]) for name in ("a", "b", "c")],
    "with money": [Charge([slots(999), daily(9_999)])] * 2,
}


def bulk(data: bytes) -> bytes:
    """A bulk string of the Redis protocol."""
    return b"$%d\r\n%b\r\n" % (len(data), data)


def integer(number: int) -> bytes:
    """An integer of the Redis protocol."""
    return b":%d\r\n" % number


def array(*parts: bytes) -> bytes:
    """An array of the Redis protocol."""
    return b"*%d\r\n%b" % (len(parts), b"".join(parts))


NONSENSE = {
    "nil": b"$-1\r\n",
    "nil of RESP3": b"_\r\n",
    "an integer": b":1\r\n",
    "an error": b"-ERR no\r\n",
    "a list": array(bulk(b"\1")),
    "an empty list": b"*0\r\n",
    "a nil list": b"*-1\r\n",
    "lists in lists": b"*1\r\n" * 6 + b":1\r\n",
    "a status": b"+OK\r\n",
    "a double": b",1.5\r\n",
    "a boolean": b"#t\r\n",
    "a map": b"%1\r\n+a\r\n:1\r\n",
    "a set": b"~1\r\n:1\r\n",
    "a push": b">2\r\n+message\r\n:1\r\n",
    "empty": bulk(b""),
    "short": bulk(b"\1\0\0"),
    "words": bulk(b"admitted"),
}
"""In place of an answer, of the time, or of the whole reply."""
TIMES = {
    "text": bulk(b"soon"),
    "digits": bulk(b"1763900000000000"),
    "negative": integer(-1763900000000000),
    "a fraction": b",1763900000000000.5\r\n",
    "huge": integer(2**63 - 1),
    "a little too late": integer(2**53 + 1),
    "infinite": b",inf\r\n",
    "not a number": b",nan\r\n",
    "a big number": b"(1763900000000000\r\n",
}

Spoil = Callable[[int, list[bytes]], bytes]
"""Makes another reply of the time and the answers of a right one."""


def _with_answer(wrong: bytes, time: int, answers: list[bytes]) -> bytes:
    return array(integer(time), *map(bulk, answers[:-1]), wrong)


def _with_time(wrong: bytes, _time: int, answers: list[bytes]) -> bytes:
    return array(wrong, *map(bulk, answers))


def _with_all(wrong: bytes, _time: int, _answers: list[bytes]) -> bytes:
    return wrong


def spoilt_answers() -> dict[str, Spoil]:
    """Every kind of wrong reply, by name."""
    kinds: dict[str, Spoil] = {}
    for name, wrong in NONSENSE.items():
        kinds[f"{name} for an answer"] = partial(_with_answer, wrong)
        if name != "an integer":
            kinds[f"{name} for the time"] = partial(_with_time, wrong)
        kinds[f"{name} for all"] = partial(_with_all, wrong)
    for name, wrong in TIMES.items():
        kinds[f"a time that is {name}"] = partial(_with_time, wrong)
    return kinds | {
        "one answer too few": lambda time, answers: array(integer(time), *map(bulk, answers[1:])),
        "one answer too many": lambda time, answers: array(integer(time), *map(bulk, [*answers, b"\1"])),
        "no time": lambda _time, answers: array(*map(bulk, answers)),
        "a push of the right length": lambda time, answers: (
            b">%d\r\n" % (1 + len(answers)) + b"".join([integer(time), *map(bulk, answers)])
        ),
        "another letter": lambda time, answers: array(
            integer(time), *[bulk(b"\7" + each[1:]) for each in answers]
        ),
        "a byte more": lambda time, answers: array(integer(time), *[bulk(each + b"\0") for each in answers]),
        "a byte less": lambda time, answers: array(integer(time), *[bulk(each[:-1]) for each in answers]),
        "no protocol": lambda _time, _answers: b"?!\r\n",
        "a length that is none": lambda _time, _answers: b"*x\r\n",
    }


SPOILT = spoilt_answers()
PARTS = 3
"""Tests that share the kinds of wrong replies."""


class Spoiler:
    """Changes replies of the script to charges on their way; others, to the probe above all, pass."""

    def __init__(self, spoil: Spoil, *, longer_than: int = 1) -> None:
        self._spoil = spoil
        self._longer_than = longer_than
        self.spoilt = 0

    def __call__(self, data: bytes) -> bytes:
        """Pass replies on, and other ones in place of those to charges."""
        reader = hiredis.Reader()
        reader.feed(data)
        sent = b""
        while (reply := reader.gets()) is not False:
            if isinstance(reply, int):  # of a plain command, such as a release
                sent += integer(reply)
                continue
            if not isinstance(reply, list):
                return data  # an error, or part of the handshake
            if max(map(len, reply[1:])) > self._longer_than:
                self.spoilt += 1
                sent += self._spoil(reply[0], reply[1:])
            else:
                sent += array(integer(reply[0]), *map(bulk, reply[1:]))
        return sent


@pytest.fixture
async def proxy(redis_server: StoreServer) -> AsyncIterator[Proxy]:
    """A way to a server, on which replies can be spoilt."""
    async with Proxy(redis_server.port) as proxy:
        yield proxy


async def failure_of(call: Awaitable[object]) -> BaseException:
    """Return the error that a call raises, in time."""
    async with asyncio.timeout(30):
        with pytest.raises(BackendError) as raised:
            await call
    return raised.value


async def is_there(backend: RedisBackend) -> bool:
    """Whether the server is thought to be there."""
    return backend.error is None


@pytest.mark.parametrize("charges", CHARGES)
@pytest.mark.parametrize("part", range(PARTS))
async def test_whoever_waits_for_a_wrong_answer_is_told(
    redis_server: StoreServer, part: int, charges: str, caplog: pytest.LogCaptureFixture
) -> None:
    """All of the batch fail at once, what they may have charged comes back, and the connection is dropped."""
    caplog.set_level(logging.WARNING, "ratelimit_mw")
    # Together, since each waits until nobody can execute what was given up.
    kinds = [*SPOILT][part::PARTS]
    errors = await asyncio.gather(
        *[_check_wrong_answer(redis_server, SPOILT[kind], charges) for kind in kinds], return_exceptions=True
    )
    assert {kind: error for kind, error in zip(kinds, errors, strict=True) if error is not None} == {}
    said = Counter(each.message[:16] for each in caplog.records)
    assert said == {"backend is away:": len(kinds), "backend is back": len(kinds)}


async def _check_wrong_answer(server: StoreServer, spoil: Spoil, charges: str) -> None:
    async with Proxy(server.port) as proxy:
        backend = RedisBackend(proxy.url, timeout=TIMEOUT)
        await backend.open()
        proxy.change = spoiler = Spoiler(spoil)
        made = len(proxy.accepted)
        results = await asyncio.gather(
            *[backend.acquire(charge, new_id(), 1) for charge in CHARGES[charges]], return_exceptions=True
        )
        assert {type(each) for each in results} == {BackendError}
        assert not any("within" in str(each) for each in results)
        assert spoiler.spoilt == 1
        proxy.change = None
        await eventually(lambda: is_there(backend))
        assert len(proxy.accepted) == made + 1
        for charge in CHARGES[charges]:
            held = Charge([counter for counter in charge.counters if not isinstance(counter.limit, Window)])

            async def is_given_back(held: Charge = held) -> bool:
                return not any((await peeked(backend, held)).counted)

            await eventually(is_given_back)
        await backend.close()


@pytest.mark.parametrize(
    ("flag", "admitted"), [(1, 4), (1, 65_535), (0, 2), (1, 0)], ids=["more", "most", "none", "some"]
)
async def test_no_more_are_admitted_than_were_asked_for(proxy: Proxy, flag: int, admitted: int) -> None:
    """An answer fails unless its number of admitted charges fits the charges sent and the first outcome."""

    def spoil(time: int, answers: list[bytes]) -> bytes:
        wrong = [bytes([flag]) + each[1:-2] + admitted.to_bytes(2, "little") for each in answers]
        return array(integer(time), *map(bulk, wrong))

    backend = RedisBackend(proxy.url, timeout=TIMEOUT)
    await backend.open()
    proxy.change = Spoiler(spoil)
    (charge,) = CHARGES["alone"]
    results = await asyncio.gather(
        *[backend.acquire(charge, new_id()) for _ in range(3)], return_exceptions=True
    )
    assert {type(each) for each in results} == {BackendError}
    proxy.change = None
    await backend.close()


async def test_what_was_answered_before_stays(proxy: Proxy) -> None:
    """A wrong reply to one batch takes nothing from the holds of the batches before it."""
    backend = RedisBackend(proxy.url, timeout=TIMEOUT)
    (charge,) = CHARGES["with money"][:1]
    reservation = (await backend.acquire(charge, new_id(), 5)).reservation
    proxy.change = Spoiler(SPOILT["another letter"])
    await failure_of(backend.acquire(charge, new_id(), 5))
    proxy.change = None
    await eventually(lambda: is_there(backend))
    assert await backend.renew(reservation, 30)
    assert await backend.settle(reservation, 7) is Settlement.SETTLED
    await backend.close()


@pytest.mark.parametrize("wrong", ["nil", "a list", "empty", "words", "an integer"])
async def test_what_is_owed_is_sent_until_it_is_understood(proxy: Proxy, wrong: str) -> None:
    """Releases and settles that got a wrong answer arrive, each counted once."""
    backend = RedisBackend(proxy.url, timeout=TIMEOUT)
    charge = Charge([slots(9), daily(100)])
    settled, released = [(await backend.acquire(charge, new_id(), 10)).reservation for _ in range(2)]
    plain = (await backend.acquire(Charge([slots(9)]), new_id())).reservation
    proxy.change = Spoiler(SPOILT[f"{wrong} for an answer"], longer_than=0)
    owed = [
        asyncio.ensure_future(backend.settle(settled, 7)),
        *[
            asyncio.ensure_future(_done(backend.finish(each, EstimateAction.GIVE_BACK)))
            for each in (released, plain)
        ],
    ]
    assert "could not be read" in str(await failure_of(backend.renew(settled, 30)))
    proxy.change = None
    async with asyncio.timeout(30):
        assert (await asyncio.gather(*owed))[0] in {Settlement.SETTLED, Settlement.REPEATED}
    assert (await peeked(backend, charge)).counted == [1, 7]
    await backend.close()


@pytest.mark.parametrize("kind", ["nil for all", "an integer for all", "words for an answer", "no protocol"])
async def test_a_server_that_answers_the_probe_wrongly_is_away(proxy: Proxy, kind: str) -> None:
    """Connecting ends with a first answer that makes sense, and is tried until there is one."""
    backend = RedisBackend(proxy.url, timeout=0.5)
    proxy.change = Spoiler(SPOILT[kind], longer_than=0)
    await backend.open()
    await failure_of(backend.acquire(CHARGES["alone"][0], new_id()))
    proxy.change = None
    await eventually(lambda: is_there(backend))
    await backend.close()


async def test_a_server_that_goes_on_answering_wrongly_is_not_asked_all_the_time(proxy: Proxy) -> None:
    """Attempts grow rare, as for any server that is away, if the probe is answered and requests are not."""
    backend = RedisBackend(proxy.url, timeout=0.5)
    await backend.open()
    proxy.change = Spoiler(SPOILT["another letter"])
    made, end = len(proxy.accepted), asyncio.get_running_loop().time() + 2
    while asyncio.get_running_loop().time() < end:
        await failure_of(backend.acquire(CHARGES["alone"][0], new_id()))
        await asyncio.sleep(0.005)
    assert len(proxy.accepted) - made < 15
    await backend.close()


def questions_to(keys: KeyStore, figures: FiguresStore) -> list[Callable[[], Awaitable[object]]]:
    """All that the stores beside the counts ask a server."""
    question = FiguresQuery([1], [1], 0.0)
    return [
        keys.version,
        keys.entries,
        lambda: keys.write({"hash": b"entry"}),
        figures.now,
        lambda: figures.write(Report("w", "{}", {"a": 1})),
        lambda: figures.read(question),
        lambda: figures.history(["a"], [1]),
        lambda: figures.leave("w"),
    ]


@pytest.mark.parametrize("wrong", NONSENSE)
async def test_keys_and_figures_are_read_from_answers_that_make_sense(proxy: Proxy, wrong: str) -> None:
    """A store returns sound values or raises a `BackendError`, whatever the server answers."""
    settings = BackendSettings(url=SecretURL(proxy.url), timeout=0.5)
    keys, figures = open_key_store(settings, timeout=0.5), open_figures_store(settings, timeout=0.5)
    for call in questions_to(keys, figures):
        await eventually(partial(_succeeds, call))
        proxy.change = _only(NONSENSE[wrong])
        try:
            async with asyncio.timeout(30):
                await call()
        except BackendError:
            pass
        proxy.change = None
    for store in (keys, figures):
        await store.close()


@pytest.mark.parametrize("wrong", NONSENSE)
async def test_wrong_answers_to_stores_reach_no_request_of_their_connection(
    proxy: Proxy, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong answer to keys or figures on the connection of requests is not an outage; no request waits."""
    caplog.set_level(logging.WARNING, "ratelimit_mw")
    settings = BackendSettings(url=SecretURL(proxy.url), timeout=10)
    backend = RedisBackend(proxy.url, timeout=10)  # which a busy machine doesn't need for an answer
    await backend.open()
    keys = open_key_store(settings, timeout=0.5, beside=backend)
    figures = open_figures_store(settings, timeout=0.5, beside=backend)
    (charge,) = CHARGES["alone"]
    for call in questions_to(keys, figures):
        await eventually(partial(_succeeds, call))
        proxy.change = _but_charges(NONSENSE[wrong])
        charged = [asyncio.ensure_future(backend.acquire(charge, new_id())) for _ in range(3)]
        try:
            async with asyncio.timeout(30):
                await call()
        except BackendError:
            pass
        async with asyncio.timeout(30):
            assert [outcome.admitted for outcome in await asyncio.gather(*charged)] == [True] * 3
        proxy.change = None
    assert [each.message for each in caplog.records if each.message.startswith("backend is")] == []
    for store in (keys, figures, backend):
        await store.close()


def _but_charges(wrong: bytes) -> Callable[[bytes], bytes]:
    """Put a wrong reply in place of every one but the script's to charges."""
    reader = hiredis.Reader()  # of all data, since a reply may come in two parts

    def change(data: bytes) -> bytes:
        reader.feed(data)
        sent = b""
        while (reply := reader.gets()) is not False:
            is_decided = isinstance(reply, list) and len(reply) > 1 and reply[0].__class__ is int
            sent += array(integer(reply[0]), *map(bulk, reply[1:])) if is_decided else wrong
        return sent

    return change


@pytest.mark.parametrize("wrong", NONSENSE)
async def test_a_map_of_a_cluster_that_makes_no_sense_is_none(cluster: Cluster, wrong: str) -> None:
    """A node that tells nonsense of who serves what is passed over like one that is away."""
    async with Proxy(cluster.nodes[0].port) as proxy:
        proxy.change = _only(NONSENSE[wrong])
        backend = ClusterBackend(f"redis+cluster://{HOST}:{proxy.port}", timeout=0.3)
        await backend.open()
        await failure_of(backend.acquire(CHARGES["alone"][0], new_id()))
        proxy.change = None

        async def serves() -> bool:
            try:
                return (await backend.acquire(CHARGES["alone"][0], new_id())).admitted
            except BackendError:
                return False

        await eventually(serves)
        await backend.close()


@pytest.mark.parametrize("wrong", ["an integer", "a list", "words", "lists in lists"])
async def test_a_sentinel_that_makes_no_sense_is_passed_over(
    sentinels: Sentinels,  # noqa: F811 - the fixture
    wrong: str,
) -> None:
    """The others name the primary."""
    async with Proxy(sentinels.sentinels[0].port) as proxy:
        proxy.change = _only(NONSENSE[wrong])
        url = f"redis+sentinel://{HOST}:{proxy.port},{HOST}:{sentinels.sentinels[1].port}/{SERVICE}"
        for _ in range(4):
            backend = RedisBackend(url, timeout=TIMEOUT)
            assert (await backend.acquire(CHARGES["alone"][0], new_id())).admitted
            await backend.close()


def _only(wrong: bytes) -> Callable[[bytes], bytes]:
    """Changes every reply but those of the handshake."""
    return lambda data: data if data.startswith((b"+OK", b"-ERR")) else wrong


async def _succeeds(call: Callable[[], Awaitable[object]]) -> bool:
    try:
        await call()
    except BackendError:
        return False
    return True


async def _done(what: Awaitable[object]) -> object:
    return await what
