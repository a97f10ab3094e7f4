"""`ratelimit-mw routes`: for every route of an app, which rule and limits apply."""

from typing import Annotated, Any

import typer

from ratelimit_mw._internal.asgi.app_routes import Covered, cover
from ratelimit_mw._internal.asgi.marked_routes import limits_of
from ratelimit_mw._internal.asgi.route_walk import AppRoute, app_routes
from ratelimit_mw._internal.cli.apps import code_limit_json, findings_of, import_app, names_text
from ratelimit_mw._internal.cli.output import console, print_json, print_table
from ratelimit_mw._internal.cli.sources import load
from ratelimit_mw._internal.cli.texts import limit_json, rates_text, route_text
from ratelimit_mw._internal.settings import PlanSettings, RouteSettings, Settings


def routes(
    app: Annotated[
        str, typer.Argument(help="The app, such as main:app; a function without parameters is called.")
    ],
    settings: Annotated[
        str | None,
        typer.Option(
            "--settings",
            metavar="FILE",
            help="The settings file. Default: the app's own, else $RATELIMIT_SETTINGS, else ratelimit.toml "
            "here.",
        ),
    ] = None,
    app_dir: Annotated[
        str, typer.Option("--app-dir", metavar="FOLDER", help="The folder that the app is imported from.")
    ] = ".",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say for every route of an app which rule and limits apply.

    Imports the app, but doesn't run it. Mounted apps are included.
    """
    mounted = import_app(app, app_dir)
    loaded = load(settings) if settings or mounted.settings is None else mounted.settings
    covered = list(cover(app_routes(mounted.app), loaded))
    used = {rule for each in covered for rule in each.rules}
    unused = [index for index in range(len(loaded.routes)) if index not in used]
    if json:
        print_json(_json(loaded, covered, unused, is_mounted=mounted.settings is not None))
    else:
        _print(loaded, covered, unused, is_mounted=mounted.settings is not None)
        for finding in findings_of(mounted, loaded):
            console.print(f"{finding.level}: {finding}", soft_wrap=True)


def _print(settings: Settings, covered: list[Covered], unused: list[int], *, is_mounted: bool) -> None:
    console.print(f"{settings.source}: the limits of each route, on top of the caller's plan")
    console.print()
    columns = ("method", "path", "rule", "cost", "price", "each caller", "all callers", "in code", "")
    print_table(columns, [row for each in covered for row in _rows(settings, each)])
    if not is_mounted:
        console.print()
        text = "warning: no RateLimitMiddleware is mounted on this app: nothing limits it."
        console.print(text, soft_wrap=True)
    for index in unused:
        text = f"note: routes[{index}] ({route_text(settings.routes[index])}) matches no route of the app."
        console.print(text, soft_wrap=True)


def _rows(settings: Settings, covered: Covered) -> list[tuple[object, ...]]:
    methods = "WebSocket" if covered.route.kind == "websocket" else _methods(covered.methods)
    path = covered.route.path
    if not covered.rules:
        return [
            (
                methods,
                path,
                "?",
                "?",
                "?",
                "?",
                "?",
                "?",
                "unknown, as the path has a convertor of the app: see explain",
            )
        ]
    some, in_code = len(covered.rules) > 1, names_text(limits_of(covered.route), settings)
    rows = [_cells(settings, rule, some=some) for rule in covered.rules]
    return [(methods, path, *cells[:-1], in_code, cells[-1]) for cells in rows]


def _cells(settings: Settings, index: int | None, *, some: bool) -> tuple[object, ...]:
    """Return the cells of one route rule. With `some` it holds for part of the route's paths only."""
    says = ["some paths"] if some else []
    if index is None:
        return "-", 1, "-", "-", "-", ", ".join(says)
    rule = settings.routes[index]
    says += ["exempt"] if rule.exempt else []
    says += [] if rule.slot or rule.exempt else ["no slot"]
    says += ["shadow"] if rule.shadow else []
    cost = "-" if rule.exempt else rule.cost
    price = "-" if rule.price is None else rule.price
    name = f"[{index}] {route_text(rule)}"
    return name, cost, price, rates_text(rule.requests), rates_text(rule.total), ", ".join(says)


def _methods(methods: tuple[str, ...]) -> str:
    return "any" if methods == ("*",) else ", ".join(methods)


def _json(
    settings: Settings, covered: list[Covered], unused: list[int], *, is_mounted: bool
) -> dict[str, Any]:
    return {
        "source": settings.source,
        "mounted": is_mounted,
        "routes": [
            {
                **_route_json(each.route),
                "methods": list(each.methods),
                "rules": [_rule_json(settings, rule) for rule in each.rules],
                "code_limits": [code_limit_json(limit, settings) for limit in limits_of(each.route)],
            }
            for each in covered
        ],
        "plans": {name: _limits_json(plan) for name, plan in settings.plans.items()},
        "unused_rules": unused,
    }


def _limits_json(plan: PlanSettings) -> list[dict[str, Any]]:
    slots = (plan.concurrent,) if plan.concurrent else ()
    allowances = plan.spending.budget.allowances if plan.spending else ()
    windows = [window for each in (plan.requests, *plan.units.values()) for window in each]
    return [*map(limit_json, windows), *map(limit_json, slots), *map(limit_json, allowances)]


def _route_json(route: AppRoute) -> dict[str, Any]:
    return {"path": route.path, "kind": route.kind}


def _rule_json(settings: Settings, index: int | None) -> dict[str, Any] | None:
    if index is None:
        return None
    rule: RouteSettings = settings.routes[index]
    return {
        "index": index,
        "path": rule.path,
        "methods": sorted(rule.methods) if rule.methods else None,
        "exempt": rule.exempt,
        "cost": rule.cost,
        "price": None if rule.price is None else str(rule.price),
        "units": rule.units,
        "slot": rule.slot,
        "requests": [limit_json(window) for window in rule.requests],
        "total": [limit_json(window) for window in rule.total],
    }
