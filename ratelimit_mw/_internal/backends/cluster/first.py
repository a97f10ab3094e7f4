"""The first answer of several servers that all know it: sentinels, nodes of a cluster."""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from ratelimit_mw._internal.model.backend import BackendError

T = TypeVar("T")


async def first_answer(asks: Iterable[Callable[[], Coroutine[Any, Any, T]]], patience: float) -> T:
    """Ask one after the other, the next where one fails or is silent for `patience` seconds.

    A silent one may still answer first. Raises the last `BackendError` where all have failed.
    """
    left = deque(asks)
    waiting: set[asyncio.Task[T]] = set()
    error = BackendError("no server is left to ask")
    try:
        while waiting or left:
            if left:
                waiting.add(asyncio.create_task(left.popleft()()))
            done, waiting = await asyncio.wait(
                waiting, timeout=patience if left else None, return_when=asyncio.FIRST_COMPLETED
            )
            failures = [task.exception() for task in done]
            for task, failure in zip(done, failures, strict=True):
                if not isinstance(failure, BackendError):
                    return task.result()
                error = failure
        raise error
    finally:
        for task in waiting:
            task.cancel()
        if waiting:  # until they have closed what they had opened
            await asyncio.wait(waiting, timeout=patience)
