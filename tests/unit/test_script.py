"""The Lua scripts: small files with a header each, put together as one text that the server gets."""

import hashlib
import re
import struct
from pathlib import Path

import pytest

from ratelimit_mw._internal.backends.redis import (
    calls,
    letters,
    meter_packing,
    own_costs,
    packing,
    renewal_packing,
    script,
)
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.backends.redis.estimate_operation import ESTIMATE
from ratelimit_mw._internal.model.backend import EstimateAction, Settlement
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.periods import KEPT_AFTER_END
from ratelimit_mw._internal.model.reservation import LEASE_ID_SIZE
from tests.support.conformance import TIMEOUT, daily, new_id, slots, window
from tests.support.servers import StoreServer

FOLDER = Path(script.__file__).with_name("lua")
FILES = sorted(FOLDER.glob("*.lua"))
SCRIPTS = {"batch", "changes", "close", "figures", "replace_entries"}
"""Files that begin a script; the others are parts of one."""
MOST_LINES = 200
PER_FILE = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def code_of(text: str) -> str:
    """A file without its comments and constants."""
    return script.with_constants(text)


@PER_FILE
def test_a_file_has_a_header_that_says_what_it_is_for(path: Path) -> None:
    """A script says what it gets, answers, guarantees and costs; a part what it needs and gives."""
    header, empty, _ = path.read_text("utf-8").partition("\n\n")
    assert empty
    lines = header.splitlines()
    assert lines[0].startswith(f"-- {path.name}: ")
    assert all(line.startswith("--") for line in lines)
    sections = {line.split()[1].rstrip(":") for line in lines[1:] if re.match(r"-- [A-Z]\w+:? ", line)}
    assert sections >= (
        {"Guarantee", "KEYS", "ARGV", "Reply", "Cost"} if path.stem in SCRIPTS else {"Needs", "Gives"}
    )


@PER_FILE
def test_a_file_is_small(path: Path) -> None:
    """One concept a file, which can be read at once."""
    assert len(path.read_text("utf-8").splitlines()) <= MOST_LINES


@PER_FILE
def test_a_file_has_no_bare_letter_or_code(path: Path) -> None:
    """Letters of operations and limits, and bytes of answers, have names: nobody has to know 70."""
    lines = [line for line in path.read_text("utf-8").splitlines() if not re.match(r"local [A-Z_]+ = ", line)]
    code = code_of("\n".join(lines))
    assert not re.findall(r"'(?:[A-Z]|\\[1-9])'", code)
    assert not re.findall(r"[=~]= *[1-9]\d\b|\[\d\d+\]", code)


@PER_FILE
def test_a_file_is_lua_by_itself(path: Path, server: StoreServer) -> None:
    """Every server's compiler takes each file alone, so editors and linters can read it, too."""
    with server.client() as client:
        assert client.script_load(path.read_text("utf-8"))


def included(name: str) -> set[str]:
    """The files that one includes, and those that these include."""
    text = FOLDER.joinpath(f"{name}.lua").read_text("utf-8")
    names = set(re.findall(r"^ *-- include (\w+)$", text, re.MULTILINE))
    return names.union(*map(included, names))


def test_every_file_is_a_part_of_a_script() -> None:
    """No file is left over."""
    assert set.union(SCRIPTS, *map(included, SCRIPTS)) == {path.stem for path in FILES}


def test_one_operation_and_several_are_decided_by_the_same_files() -> None:
    """A call of one operation has a way of its own, and no rule of its own."""
    lone, several = included("lone"), included("batch") - {"lone"} - included("operations")
    assert lone <= several | included("operations")
    assert {"decide", "windows", "slots", "charges", "charge_answers", "releases"} <= lone


def globals_in(chunk: bytes) -> tuple[set[bytes], set[bytes]]:  # noqa: C901 - one format, read in its order
    """The globals that a compiled chunk of Lua 5.1 reads and writes."""
    found: tuple[set[bytes], set[bytes]] = set(), set()
    at = 12  # behind the header: sizes of eight bytes, integers of four

    def number(kind: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{kind}", chunk, at)
        at += struct.calcsize(kind)
        return int(value) if kind != "d" else 0

    def text() -> bytes:
        nonlocal at
        size = number("Q")
        at += size
        return chunk[at - size : at - 1]

    def function() -> None:
        nonlocal at
        text()
        at += 12
        code = [number("I") for _ in range(number("i"))]
        constants = list[bytes]()
        for _ in range(number("i")):
            kind = number("B")
            constants.append(text() if kind == 4 else b"")
            if kind in {1, 3}:
                number("Bd"[kind == 3])
        for _ in range(number("i")):
            function()
        for _ in range(number("i")):
            number("i")
        for _ in range(number("i")):
            text()
            at += 8
        for _ in range(number("i")):
            text()
        for instruction in code:
            if instruction & 63 in {5, 7}:  # GETGLOBAL, SETGLOBAL
                found[instruction & 63 == 7].add(constants[instruction >> 14])

    function()
    return found


def test_a_script_has_no_globals_but_those_of_the_server(redis_server: StoreServer) -> None:
    """Every name stands for something: a misspelt one would fail when it is first met."""
    with redis_server.client() as client:
        chunk = client.eval("return string.dump(loadstring(ARGV[1]))", 0, script.load_script("batch"))
    read, written = globals_in(chunk)
    assert not written
    functions = b"error ipairs pcall tonumber tostring type unpack"
    assert read == set(b"ARGV KEYS math redis string struct table".split() + functions.split())


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_a_script_loads_on_every_server(name: str, server: StoreServer) -> None:
    """The text that was put together is one script that Redis 6.2 and Valkey take."""
    text = script.load_script(name)
    with server.client() as client:
        assert client.script_load(text) == hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_a_script_has_neither_comments_nor_constants(name: str) -> None:
    """Names of constants are gone: one that is left would be a global, which is not there."""
    code = re.sub(r"'[^']*'", "''", script.load_script(name))
    assert "--" not in code
    assert set(re.findall(r"\b[A-Z][A-Z_]*\b", code)) == {"KEYS", "ARGV"}


def test_values_stand_where_constants_are_used() -> None:
    """A letter becomes its code; strings stay as they are, also those that read like other tokens."""
    text = """
        -- A comment with LIMIT, and it's skipped.
local LIMIT = 25 -- bytes
local WINDOW = byte('W')
local DAMAGED = 'DAMAGED'

        if kind == WINDOW then error(DAMAGED, LIMIT) end -- LIMIT
        call('LIMIT', '-- LIMIT', LIMITS)
"""
    assert script.with_constants(text) == (
        "if kind == 87 then error('DAMAGED', 25) end\ncall('LIMIT', '-- LIMIT', LIMITS)\n"
    )


def test_a_constant_has_one_value() -> None:
    """Two files that give one name two meanings are told so."""
    with pytest.raises(ValueError, match="STEPS is defined twice"):
        script.with_constants("local STEPS = 1\nlocal STEPS = 2\n")


def test_letters_sizes_and_answers_are_those_of_the_packing() -> None:
    """Letters, sizes and answers are the same on both sides of the wire."""
    pairs = re.findall(
        r"^local ([A-Z_]+) = (?:byte\('(.)'\)|'?([^'\s]+)'?)",
        "\n".join(path.read_text("utf-8") for path in FILES),
        re.MULTILINE,
    )
    lua = {name: letter or value.removeprefix("\\") for name, letter, value in pairs}
    names = [name for name in vars(letters) if name.isupper()]
    assert len(names) > 10
    for name in names:
        assert lua[name] == getattr(letters, name).decode().replace("\1", "1"), name
    sizes = {
        "LIMIT_SIZE": packing.LIMIT,
        "CHARGE_HEAD": packing.CHARGE_HEAD,
        "SETTLE_HEAD": packing.SETTLE_HEAD,
    }
    sizes |= {"FINISH_HEAD": packing.FINISH_HEAD, "OWN_HEAD": own_costs.OWN_HEAD}
    sizes |= {"METER_HEAD": meter_packing.METER_HEAD, "METER_SIZE": own_costs.METER}
    for name, packed in sizes.items():
        assert int(lua[name]) == packed.size, name
    assert int(lua["ID_SIZE"]) == LEASE_ID_SIZE
    for name in ("REFUSED", "ADMITTED", "OTHER_PERIOD", "MOST_COST"):
        assert int(lua[name]) == getattr(packing, name), name
    assert int(lua["NOT_RENEWED"]) == renewal_packing.NOT_RENEWED
    assert {f"MONEY_{each.name}": str(each.value) for each in EstimateAction}.items() <= lua.items()
    assert int(lua["OWN_SIZE"]) == packing.LIMIT.size + own_costs.OWN_COST.size
    assert int(lua["CLOSED_SIZE"]) == int(lua["MEMBER_SIZE"]) + 8 == ESTIMATE.size + 8
    assert {f"UNITS_{each.name}": str(each.value) for each in meter_packing.Mode}.items() <= lua.items()
    assert {each.name: str(each.value) for each in Settlement}.items() <= lua.items()
    assert int(lua["KEPT_AFTER_END"]) == KEPT_AFTER_END


async def test_whatever_is_sent_the_script_is_the_same(server: StoreServer) -> None:
    """Nothing of a request is written into the script: it is an argument, so a server knows one text."""
    with server.client() as client:
        client.script_flush()
        for name in ("a", "'--", "]]%s{}"):
            backend = RedisBackend(server.url, timeout=TIMEOUT)
            counters = [window(7, of=name, scope=name), slots(3, of=name, scope=name), daily(5, of=name)]
            outcome = await backend.acquire(Charge(counters), new_id(), 3)
            assert outcome.admitted
            await backend.close()
        assert client.info("memory")["number_of_cached_scripts"] == 1
        assert client.script_exists(hashlib.sha1(calls.SCRIPT, usedforsecurity=False).hexdigest()) == [True]
