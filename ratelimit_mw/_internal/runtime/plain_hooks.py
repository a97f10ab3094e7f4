"""Checks of the hooks that an app hands in: a wrong one is an error then, and not when it is called."""

import inspect

_PLAIN = "{} must be a plain function, not a coroutine function, since it is not awaited. {}"
START_A_TASK = "Start a task in it (asyncio.create_task) instead."
"""Advice for hooks that only listen."""


def check_hooks(**hooks: object) -> None:
    """Raise TypeError for a hook that can't be called; None stands for none."""
    for name, hook in hooks.items():
        if hook is not None and not callable(hook):
            raise TypeError(f"{name} must be a function, not {hook!r:.60}")


def check_plain(hook: object, name: str, advice: str = START_A_TASK) -> None:
    """Raise TypeError for a hook that can't be called, or would have to be awaited and so never run."""
    check_hooks(**{name: hook})
    called = getattr(type(hook), "__call__", None)  # noqa: B004 - of an object that is called like a function
    if inspect.iscoroutinefunction(hook) or inspect.iscoroutinefunction(called):
        raise TypeError(_PLAIN.format(name, advice).rstrip())


def check_nothing_to_await(result: object, name: str, advice: str = START_A_TASK) -> None:
    """Raise TypeError if a hook returned a coroutine, which could not be seen before the call."""
    if inspect.iscoroutine(result):
        result.close()
        raise TypeError(_PLAIN.format(name, advice).rstrip())
