"""Pages of the demo for a browser: what it is, and which paths and limits it has."""

from collections.abc import Iterable
from html import escape

from ratelimit_mw._internal.model.limit_text import limit_text
from ratelimit_mw._internal.settings import PlanSettings, RouteSettings, Settings
from ratelimit_mw._internal.settings.findings import DOCS

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
pre {{ overflow-x: auto; padding: 1rem; border: 1px solid GrayText; border-radius: .5rem }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
th, td {{ text-align: left; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid GrayText }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
_PATHS = {
    "GET /health": "Whether the API is up, for a load balancer.",
    "GET /v1/models": "A quick request.",
    "POST /v1/predictions": 'Reverses the text of <code>{"prompt": "hello"}</code>; takes a second.',
    "GET /v1/predictions/{id}": "A prediction that was made.",
}


def home(tries: str) -> str:
    """The first page: where to go, and what to try in a terminal."""
    body = f"""\
<p>An API behind ratelimit_mw, with limits that are small enough to reach by hand.</p>
<ul>
<li><a href="/dashboard">The dashboard</a> shows live who is limited. Its token is in the terminal.</li>
<li><a href="/docs">Paths and limits</a> of this API.</li>
<li><a href="{DOCS}/">The documentation</a> of ratelimit_mw.</li>
</ul>
<h2>Try, in a terminal</h2>
<pre>{escape(tries)}</pre>"""
    return _PAGE.format(title="A prediction API", body=body)


def reference(settings: Settings) -> str:
    """The second page: each path with its rule, each plan with its limits, as the settings say."""
    rules = {f"{method} {rule.path}": rule for rule in settings.routes for method in rule.methods or {"GET"}}
    paths = [(f"<code>{path}</code>", text, _rule(rules.get(path))) for path, text in _PATHS.items()]
    plans = [(escape(name), *_limits(plan)) for name, plan in settings.plans.items()]
    body = f"""\
{_table(("path", "what it does", "rule"), paths)}
<h2>Plans</h2>
{_table(("plan", "requests", "slots", "spending"), plans)}
<p>Send an API key as <code>X-API-Key</code>: <code>demo-pro</code> has the plan pro, any other text
is a key on the plan default, and without a key you are counted by your address. Pages like this
one are exempt. <a href="/">What to try</a></p>"""
    return _PAGE.format(title="Paths and limits", body=body)


def _rule(rule: RouteSettings | None) -> str:
    if rule is None:
        return "takes no slot"
    if rule.exempt:
        return "exempt from all limits"
    return f"holds {rule.price} of a budget, and a slot, while it runs"


def _limits(plan: PlanSettings) -> tuple[str, str, str]:
    allowances = plan.spending.budget.allowances if plan.spending else ()
    slots = [plan.concurrent] if plan.concurrent else []
    rates, at_once, spending = (
        ", ".join(map(limit_text, limits)) or "-" for limits in (plan.requests, slots, allowances)
    )
    return escape(rates), escape(at_once), escape(spending)


def _table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{title}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"
