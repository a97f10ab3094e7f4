"""The dashboard as an ASGI app: what is answered to whom, under `operations.dashboard_path`."""

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs, quote

from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketClose

from ratelimit_mw._internal.backends.rights import missing_rights
from ratelimit_mw._internal.dashboard.access import (
    CHALLENGE,
    Access,
    Operator,
    end_session,
    is_foreign,
    operators_of,
    start_session,
)
from ratelimit_mw._internal.dashboard.answers import (
    DashboardError,
    file_response,
    json_response,
    login_page,
    main_page,
    protect,
    read_body,
    read_json,
    refusal,
)
from ratelimit_mw._internal.dashboard.callers import Callers
from ratelimit_mw._internal.dashboard.compression import compress, compressed_stream, takes_gzip
from ratelimit_mw._internal.dashboard.exports import EXPORTED, EXPORTS, export_response
from ratelimit_mw._internal.dashboard.stream import Stream
from ratelimit_mw._internal.fleet import FleetView
from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.model.backend import BackendError
from ratelimit_mw._internal.policy.routing import route_path
from ratelimit_mw._internal.runtime import threads
from ratelimit_mw._internal.settings.operations import OperationsSettings

Handler = Callable[[Request, OperationsSettings], Awaitable[Response]]

LONGEST_CHANGE = 10 * 365 * 86_400
"""Seconds of the longest change that goes back by itself."""

MOST_NAMES = 50
"""Callers that are asked about at once."""

_OPERATOR = "ratelimit_mw.operator"
"""Name in the scope of a request under which its operator is."""
_LOGIN_AGAIN = "Log in, or send the token as Authorization: Bearer."


class Dashboard:
    """Answers every request under the dashboard's path. What it does costs no caller's limits."""

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter
        self._view = FleetView(limiter)
        self._access = Access()
        self._stream = Stream(self._view)
        self._callers = Callers(limiter, self._view)
        self._handlers: dict[str, dict[str, Handler]] = {
            "": {"GET": self._page},
            "/": {"GET": self._page, "POST": self._login},
            "/events": {"GET": self._events},
            "/snapshot": {"GET": self._snapshot},
            "/caller": {"POST": self._caller},
            "/callers": {"GET": self._every_caller, "POST": self._these_callers},
            "/day": {"GET": self._day},
            "/search": {"POST": self._search},
            "/reset": {"POST": self._reset},
            "/plan": {"POST": self._plan},
            "/undo": {"POST": self._undo},
            "/audit": {"GET": self._changes},
            "/logout": {"POST": self._logout},
            **{f"/export/{name}": {"GET": self._export} for name in EXPORTS},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request to a path for which `is_below` holds. There are no WebSockets here."""
        if scope["type"] == "websocket":
            await receive()
            await WebSocketClose()(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await self._answer(request)
        except DashboardError as error:
            response = refusal(error)
        except BackendError as error:
            response = refusal(self._failure(error))
        except ClientDisconnect:
            return
        compress(response, request)
        await protect(response)(scope, receive, send)

    def _failure(self, error: BackendError) -> DashboardError:
        rights = missing_rights(str(error), self._limiter.settings.backend)
        if rights is not None:
            return DashboardError(
                403, f"Rights are missing in the backend: {error}. This command gives them: {rights}"
            )
        return DashboardError(503, f"The backend does not answer: {error}")

    async def _answer(self, request: Request) -> Response:
        operations = self._limiter.settings.operations
        path = _path(request, operations)
        method = "GET" if request.method == "HEAD" and path != "/events" else request.method
        if (method, path) != ("POST", "/"):  # the login
            granted = await self._granted(request, path, operations)
            if granted is not None:
                return granted
        if is_foreign(request.headers) and (method, path) not in (("GET", ""), ("GET", "/")):
            raise DashboardError(403, "This request comes from a page of another site.")
        file = file_response(path[1:], request) if method == "GET" else None
        if file is not None:
            return file
        handlers = self._handlers.get(path)
        if handlers is None:
            raise DashboardError(404, "There is no such page.")
        if method not in handlers:
            raise DashboardError(
                405, "This path does not accept this method.", {"Allow": ", ".join(handlers)}
            )
        return await handlers[method](request, operations)

    async def _granted(self, request: Request, path: str, operations: OperationsSettings) -> Response | None:
        """Return the login page for a request without the token; None if the request has it.

        Raises `DashboardError` if a request without the token asks for anything but the page.
        """
        is_page = path in ("", "/") and request.method in ("GET", "HEAD")
        try:
            operator = await self._access.granted(request, operators_of(operations), self._address(request))
            if operator is not None:
                request.scope[_OPERATOR] = operator
                return None
        except DashboardError as error:
            if not is_page:
                raise
            return login_page(_folder(path, operations), error.message, error.status, error.headers)
        if is_page:
            return login_page(_folder(path, operations), "", 401, CHALLENGE)
        raise DashboardError(401, _LOGIN_AGAIN, CHALLENGE)

    async def _login(self, request: Request, operations: OperationsSettings) -> Response:
        form = parse_qs((await read_body(request)).decode("utf-8", "replace"))
        given = form.get("token", [""])[0].encode("utf-8", "replace")
        try:
            operator = await self._access.by_token(given, operators_of(operations), self._address(request))
        except DashboardError as error:
            return login_page("./", error.message, error.status, error.headers)
        if operator is None:
            return login_page("./", "This token is wrong.", 401, CHALLENGE)
        response = RedirectResponse("./", 303)
        start_session(response, request, operator.token)
        return response

    async def _logout(self, request: Request, _operations: OperationsSettings) -> Response:
        response = Response(status_code=204)
        end_session(response, request)
        return response

    async def _page(self, request: Request, operations: OperationsSettings) -> Response:
        return main_page(_folder(_path(request, operations), operations))

    async def _events(self, request: Request, operations: OperationsSettings) -> Response:
        def facts() -> dict[str, Any] | None:
            # A token that is changed shuts out who came in by the old one.
            now = self._limiter.settings.operations
            same = [each for each in operators_of(now) if each.is_same(known)]
            if not same or now.dashboard_path != operations.dashboard_path:
                return None
            return self._facts(now, same[0])

        known = _operator(request)

        headers = {"X-Accel-Buffering": "no", "Vary": "Accept-Encoding"}
        events = self._stream.events(facts)
        if takes_gzip(request):
            headers["Content-Encoding"] = "gzip"
            events = compressed_stream(events)
        return StreamingResponse(events, headers=headers, media_type="text/event-stream")

    async def _snapshot(self, request: Request, operations: OperationsSettings) -> Response:
        snapshot, facts = await self._view.read(), self._facts(operations, _operator(request))
        # Beside the event loop, as all of this takes a while to write.
        return await threads.call(lambda: json_response({**snapshot.as_dict(), **facts}))

    async def _caller(self, request: Request, operations: OperationsSettings) -> Response:
        values = await read_json(request)
        detail, facts = (
            await self._callers.read(_text(values, "caller")),
            self._facts(operations, _operator(request)),
        )
        return await threads.call(lambda: json_response({**detail, **facts}))

    async def _every_caller(self, _request: Request, _operations: OperationsSettings) -> Response:
        callers = await self._view.every_caller()
        return await threads.call(lambda: json_response({"callers": [each.as_dict() for each in callers]}))

    async def _these_callers(self, request: Request, _operations: OperationsSettings) -> Response:
        names = (await read_json(request)).get("names")
        if not isinstance(names, list) or len(names) > MOST_NAMES:
            raise DashboardError(400, f"names must be a list of at most {MOST_NAMES} callers.")
        callers = await self._view.these_callers([_text({"names": each}, "names") for each in names])
        return await threads.call(lambda: json_response({"callers": [each.as_dict() for each in callers]}))

    async def _day(self, _request: Request, _operations: OperationsSettings) -> Response:
        day = await self._view.day()
        return await threads.call(lambda: json_response(day.as_dict()))

    async def _export(self, request: Request, operations: OperationsSettings) -> Response:
        name, _, kind = _path(request, operations).removeprefix("/export/").partition(".")
        rows = await EXPORTED[name].rows(self._view, self._limiter)
        return await threads.call(lambda: export_response(name, kind, rows))

    async def _search(self, request: Request, _operations: OperationsSettings) -> Response:
        text = _text(await read_json(request), "text")
        return json_response({"callers": await self._view.search(text) if text.strip() else []})

    async def _reset(self, request: Request, operations: OperationsSettings) -> Response:
        _check_changes(request, operations)
        caller = _text(await read_json(request), "caller")
        cleared, change = await self._callers.reset(caller, self._who(request))
        return json_response({"cleared": cleared, "change": change.as_dict()})

    async def _plan(self, request: Request, operations: OperationsSettings) -> Response:
        _check_changes(request, operations)
        values = await read_json(request)
        plan = None if values.get("plan") is None else _text(values, "plan")
        if "caller" in values:
            hashes = await self._callers.keys_of(_text(values, "caller"))
        else:
            hashes = (_text(values, "key"),)
        change = await self._callers.set_plan(hashes, plan, self._who(request), _seconds(values))
        return json_response({"plan": plan, "change": change.as_dict()})

    async def _undo(self, request: Request, operations: OperationsSettings) -> Response:
        _check_changes(request, operations)
        change = await self._callers.undo(_text(await read_json(request), "id"), self._who(request))
        return json_response({"change": change.as_dict()})

    async def _changes(self, _request: Request, _operations: OperationsSettings) -> Response:
        try:
            changes = await self._limiter.engine.live.audit.latest()
        except BackendError as error:
            return json_response({"changes": [], "partial": f"the backend is away: {error}"})
        return json_response({"changes": [change.as_dict() for change in changes], "partial": None})

    def _who(self, request: Request) -> str:
        return f"{_operator(request).name}, {self._address(request)}"

    def _facts(self, operations: OperationsSettings, operator: Operator) -> dict[str, Any]:
        return {
            "changes": operator.may_change,
            "operator": operator.name,
            "missing_rights": self._limiter.engine.live.rights.missing,
            "logs_url": operations.logs_url,
            "choices": [*self._limiter.settings.plans],
        }

    def _address(self, request: Request) -> str:
        return self._limiter.engine.identify.address_of(request.scope)


def _path(request: Request, operations: OperationsSettings) -> str:
    """Return the part of a request's path that follows the dashboard's own path."""
    return route_path(request.scope)[len(operations.dashboard_path or "") :]


def _folder(path: str, operations: OperationsSettings) -> str:
    """The dashboard's own folder, relative to `path` under it."""
    name = quote((operations.dashboard_path or "").rpartition("/")[2])
    return "./" if path else f"./{name}/"


def _operator(request: Request) -> Operator:
    """The operator that a request was granted to."""
    operator: Operator = request.scope[_OPERATOR]
    return operator


def _check_changes(request: Request, operations: OperationsSettings) -> None:
    if not operations.dashboard_changes:
        raise DashboardError(
            403, "The dashboard can't change anything, since operations.dashboard_changes is off."
        )
    if not _operator(request).may_change:
        raise DashboardError(403, f"The token of {_operator(request).name} is read-only.")


def _text(values: dict[str, object], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str) or not _is_unicode(value):
        raise DashboardError(400, f"{name} must be a string.")
    return value


def _seconds(values: dict[str, object]) -> float | None:
    """Return the seconds that a change holds; None for good."""
    seconds = values.get("for")
    if seconds is None:
        return None
    if (
        isinstance(seconds, bool)
        or not isinstance(seconds, int | float)
        or not 1 <= seconds <= LONGEST_CHANGE
    ):
        raise DashboardError(400, f"for must be a number of seconds, from 1 to {LONGEST_CHANGE}.")
    return float(seconds)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return False
    return True
