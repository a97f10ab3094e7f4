"""Calls that the operations of a batch make together, and their answers, handed out to each."""

from binascii import hexlify
from typing import Any

from ratelimit_mw._internal.backends.redis.letters import (
    DISJOINT,
    DISJOINT_SPREAD,
    FAILED,
    SHARED,
    SHARED_SPREAD,
)
from ratelimit_mw._internal.backends.redis.operations import Operation, Template, bulk


def waiting_since(batch: list[Operation], now: float) -> float:
    """Time of submission of the first operation that may time out; `now` where there is none.

    What is sent again may have waited long for the server to be back.
    """
    for operation in batch:
        if not operation.resend:
            return operation.since
    return now


def by_template(batch: list[Operation]) -> list[list[Operation]]:
    """Group operations that are sent as one. One that has a record is a group of its own."""
    known: dict[Template, list[Operation]] = {}
    groups: list[list[Operation]] = []
    for operation in batch:
        template = operation.template
        members = None if template.record else known.get(template)
        if members is None:
            members = known[template] = []
            groups.append(members)
        members.append(operation)
    return groups


def apart(groups: list[list[Operation]]) -> list[list[Operation]]:
    """Operations that are sent apart: a list for each call, which those share whose keys share a server."""
    calls: dict[bytes | None, list[Operation]] = {}
    for group in groups:
        operation = group[0]
        template = operation.template
        if template.is_apart:
            call = calls.setdefault(template.tag, [])
            call += group
    return list(calls.values())


def compose(groups: list[list[Operation]]) -> tuple[bytes, int, int, bytes, bytes]:
    """Groups of operations in the Redis protocol: a letter, the numbers of keys and arguments, and these.

    Where the keys lie in several hash slots, on a cluster, those of the first operation are declared, and the
    others are arguments behind the operations.
    """
    keys: list[bytes] = []
    arguments: list[bytes] = []
    charged: set[str] = set()
    n_keys = charges = declared = n_declared = 0
    is_shared = is_spread = False
    tag = groups[0][0].template.tag
    for members in groups:
        operation = members[0]
        template = operation.template
        n_keys += template.n_keys
        keys.append(template.keys)
        if template.record:
            keys += (template.record, hexlify(operation.id), b"\r\n")
        if not declared:
            declared, n_declared = len(keys), n_keys
        if template.tag != tag:
            is_spread = True
        if template.charges is None:
            is_shared = True
        elif template.charges:
            charges += 1
            charged.add(template.charges)
        if len(members) == 1:
            arguments.append(template.head)
            arguments.append(operation.id)
            arguments.append(b"\r\n")
        else:
            arguments.append(template.several([each.id for each in members]))
    n_arguments = len(groups)
    is_shared = is_shared or len(charged) < charges
    letter = SHARED if is_shared else DISJOINT
    if is_spread:
        letter = SHARED_SPREAD if is_shared else DISJOINT_SPREAD
        arguments += keys[declared:]
        arguments.append(bulk(n_arguments.to_bytes(2, "little")))
        del keys[declared:]
        n_arguments += n_keys - n_declared + 1
        n_keys = n_declared
    return letter, n_keys, n_arguments, b"".join(keys), b"".join(arguments)


def hand_out(
    groups: list[list[Operation]], now: int, answers: list[bytes]
) -> list[tuple[list[Operation], bytes]]:
    """Tell operations what came of each; those that failed, and the reason, are left to the caller.

    All answers are read before anybody is told: where one makes no sense, which raises, nobody was.
    """
    failed: list[tuple[list[Operation], bytes]] = []
    read: list[tuple[Template, list[Operation], Any]] = []
    for at, operations in enumerate(groups):
        answer = answers[at]
        if type(answer) is not bytes:
            raise TypeError(f"{answer!r} is not an answer to an operation")
        if answer[:1] == FAILED:
            failed.append((operations, answer[1:]))
        else:
            first = operations[0]
            template = first.template
            read.append((template, operations, template.read(answer, len(operations))))
    for template, operations, said in read:
        template.deliver(operations, now, said)
    return failed
