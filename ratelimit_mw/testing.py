"""Testing an app that is limited: without limits, or with counts that begin at nothing.

With pytest, `pytest_plugins = ["ratelimit_mw.testing"]` in the topmost `conftest.py` adds the fixtures
`fresh` and `disabled`. PYTEST_DONT_REWRITE: an app's tests may import this module before pytest does.
"""

import asyncio
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from ratelimit_mw._internal.asgi.layers import middleware_in
from ratelimit_mw._internal.limiter.engine import Engine
from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.settings import (
    ApplicationSettings,
    BackendSettings,
    KeySettings,
    PlanSettings,
    RouteSettings,
    Settings,
)

__all__ = ["Swap", "disabled", "fresh"]

AppT = TypeVar("AppT")

_OWN_LIMITS = ("requests", "units", "concurrent", "spending")
_CLOSING = set[asyncio.Task[None]]()
"""Tasks that close engines; the event loop holds them weakly."""
_LIMITED = WeakKeyDictionary[Engine, Settings]()
"""Settings in whose place an engine limits nothing: those of a block within `disabled`."""


class Swap(Generic[AppT]):
    """A context manager in which an app is limited differently. Everything is as before at its end."""

    def __init__(self, app: AppT, change: Callable[[Settings], Settings]) -> None:
        self._app = app
        self._change = change
        self._undo = ExitStack()
        self._is_entered = False

    def __enter__(self) -> AppT:
        """Begin, and return the app. Raises LookupError where nothing limits the app, and `SettingsError`."""
        if not self._is_entered:
            for limiter in _limiters_of(self._app):
                before = limiter.engine
                settings = _LIMITED.get(before, before.settings)
                engine = before.with_settings(self._change(settings))
                if self._change is _without_limits:
                    _LIMITED[engine] = settings
                limiter.use(engine)
                self._undo.callback(_put_back, limiter, before)
            self._is_entered = True
        return self._app

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End, at the first call."""
        self._is_entered = False
        self._undo.close()


def fresh(app: AppT, *, in_memory: bool = True) -> Swap[AppT]:
    """Return a context manager within which the counts of an app begin at nothing.

    Example: `with fresh(app), TestClient(app) as client: ...`. `app` is the app, with the middleware added to
    it or around it, or a `Limiter`. Its settings hold, but for the backend: counts are in the memory of this
    process, so that no Redis is needed. With `in_memory=False` they are in the settings' own backend, under a
    namespace that nothing else uses.
    """

    def change(settings: Settings) -> Settings:
        if in_memory:
            return _in_memory(settings)
        namespace = f"{settings.backend.namespace}-{secrets.token_hex(4)}"
        backend = settings.backend.model_copy(update={"namespace": namespace})
        return settings.model_copy(update={"backend": backend})

    return Swap(app, change)


def disabled(app: AppT) -> Swap[AppT]:
    """Return a context manager within which nothing limits an app.

    Example: `with disabled(app), TestClient(app) as client: ...`. `app` is as for `fresh`.
    Every request is let through as on an exempt route: nothing is counted, no backend and no hook is asked,
    and `request.state.ratelimit` is a lease whose methods do nothing.
    """
    return Swap(app, _without_limits)


def _limiters_of(app: object) -> Iterable[Limiter]:
    if isinstance(app, Limiter):
        return [app]
    limiters: list[Limiter] = []
    for middleware in middleware_in(app):
        if middleware.settings_error is not None:
            raise middleware.settings_error
        limiters.append(middleware.limiter)
    if not limiters:
        raise LookupError(
            f"no RateLimitMiddleware is found in {app!r}; hand in the app that is served, the middleware "
            "itself, or its Limiter"
        )
    return dict.fromkeys(limiters)


def _put_back(limiter: Limiter, before: Engine) -> None:
    """Let a limiter go on as before, and close the parts that it worked with meanwhile."""
    engine = limiter.engine
    limiter.use(before)
    for loop in list(engine.live.ready):
        with suppress(RuntimeError):  # of a loop that is closed, and has closed what was its own
            loop.call_soon_threadsafe(_close, engine)


def _close(engine: Engine) -> None:
    task = asyncio.get_running_loop().create_task(engine.close(), name="ratelimit_mw testing")
    _CLOSING.add(task)
    task.add_done_callback(_CLOSING.discard)


def _in_memory(settings: Settings) -> Settings:
    # A setting in memory has no file to be watched either: a test's limits don't change by themselves.
    return settings.model_copy(update={"backend": BackendSettings()})


def _without_limits(settings: Settings) -> Settings:
    everything = RouteSettings(path="/{rest:path}", exempt=True)
    not_limited = {
        "routes": (everything,),
        "application": ApplicationSettings(),
        "plans": {name: PlanSettings() for name in settings.plans},
        "keys": tuple(map(_without_own_limits, settings.keys)),
        "identity": settings.identity.model_copy(update=dict.fromkeys(_addresses_limits(settings), ())),
    }
    return _in_memory(settings).model_copy(update=not_limited)


def _addresses_limits(settings: Settings) -> list[str]:
    """Return the names under which the settings limit or refuse addresses."""
    names = type(settings.identity).model_fields
    return [name for name in ("per_address", "blocked_networks") if name in names]


def _without_own_limits(key: KeySettings) -> KeySettings:
    return key.model_copy(update=dict.fromkeys(_OWN_LIMITS))


try:
    import pytest
except ImportError:
    pass
else:

    def _for_a_test(make: Callable[[Any], Swap[Any]], request: pytest.FixtureRequest) -> Iterator[Any]:
        with ExitStack() as stack:

            def enter(app: Any) -> Swap[Any]:
                swap = make(app)
                stack.enter_context(swap)
                return swap

            if "app" in request.fixturenames:
                with suppress(LookupError):  # a fixture of that name may be something else
                    enter(request.getfixturevalue("app"))
            yield enter

    @pytest.fixture(name="fresh")
    def _fresh(request: pytest.FixtureRequest) -> Iterator[Callable[[Any], Swap[Any]]]:
        """Begin the counts of the fixture `app` anew, if a test has one, and those of `fresh(other)`."""
        yield from _for_a_test(fresh, request)

    @pytest.fixture(name="disabled")
    def _disabled(request: pytest.FixtureRequest) -> Iterator[Callable[[Any], Swap[Any]]]:
        """Let nothing limit the fixture `app`, if a test has one, nor an app of `disabled(other)`."""
        yield from _for_a_test(disabled, request)
