"""`examples/observability/`: dashboard and alerts ask for what is exported, in PromQL that parses."""

import json
import re
from collections.abc import Iterator
from typing import Any, get_args

import promql_parser
import pytest
import yaml

from ratelimit_mw._internal.observe.stats import CALL_DURATION, METRICS
from ratelimit_mw._internal.policy.decision import Reason
from tests.support.apps import ROOT

pytestmark = pytest.mark.rerun

FOLDER = ROOT / "examples" / "observability"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
PROMETHEUS = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))
RULES = [
    rule
    for group in yaml.safe_load((FOLDER / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
EXPORTED = {
    **{metric.name + ("_total" if metric.kind == "counter" else ""): metric.labels for metric in METRICS},
    f"{CALL_DURATION.name}_bucket": ("le",),
    f"{CALL_DURATION.name}_sum": (),
    f"{CALL_DURATION.name}_count": (),
}
"""The labels of each series."""
COUNTERS = {name for name in EXPORTED if name.endswith(("_total", "_bucket", "_sum", "_count"))}
SCRAPED_LABELS = {"instance", "job"}
VALUES = {
    "outcome": {"admitted", "shadow", *get_args(Reason)},
    "policy": {"local", "allow", "deny"},
}
"""Values that labels can have, for labels of which all values are known."""


def on_dashboard() -> list[str]:
    """Every expression of the dashboard, its variables filled in as Grafana does."""
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return list(map(filled_in, found))


def filled_in(text: str) -> str:
    """An expression with values for Grafana's variables."""
    return text.replace("$__rate_interval", "1m").replace("$plan", "free")


QUERIES = [*on_dashboard(), *(rule["expr"] for rule in RULES)]


def nodes(expression: Any) -> Iterator[Any]:
    """An expression and all that it is made of."""
    yield expression
    for name in ("expr", "lhs", "rhs", "args", "vector_selector"):
        below = getattr(expression, name, None)
        for each in below if isinstance(below, list) else [below]:
            if each is not None:
                yield from nodes(each)


def selectors(expression: Any) -> list[Any]:
    """The series that an expression asks for."""
    return [each for each in nodes(expression) if isinstance(each, promql_parser.VectorSelector)]


def kept_labels(query: str) -> set[str]:
    """The labels that its result has."""
    groups = [
        node for node in nodes(promql_parser.parse(query)) if isinstance(node, promql_parser.AggregateExpr)
    ]
    if not groups:
        return SCRAPED_LABELS
    return set() if groups[0].modifier is None else set(groups[0].modifier.labels)


@pytest.mark.parametrize("query", QUERIES)
def test_every_query_asks_for_what_is_exported(query: str) -> None:
    """Metrics and labels exist, and the values that are looked for can occur."""
    asked = selectors(promql_parser.parse(query))
    assert asked
    for selector in asked:
        assert selector.name in EXPORTED
        for matcher in selector.matchers.matchers:
            assert matcher.name in {*EXPORTED[selector.name], *SCRAPED_LABELS}
            if matcher.name in VALUES:
                assert set(matcher.value.split("|")) <= VALUES[matcher.name]


@pytest.mark.parametrize("query", QUERIES)
def test_every_query_groups_by_labels_that_are_there(query: str) -> None:
    """A sum by a label that no series has would be one sum of everything."""
    for node in nodes(promql_parser.parse(query)):
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            there = SCRAPED_LABELS.union(*(EXPORTED[each.name] for each in selectors(node.expr)))
            assert set(node.modifier.labels) <= there


@pytest.mark.parametrize("query", QUERIES)
def test_counters_are_asked_for_their_growth(query: str) -> None:
    """The number of a counter says when a process was started; only its growth means something."""
    grown = [
        selector.name
        for node in nodes(promql_parser.parse(query))
        if isinstance(node, promql_parser.Call) and node.func.name in ("rate", "increase")
        for selector in selectors(node)
    ]
    asked = [selector.name for selector in selectors(promql_parser.parse(query))]
    assert sorted(grown) == sorted(name for name in asked if name in COUNTERS)


def test_everything_that_is_exported_can_be_seen() -> None:
    """No metric is left out of the dashboard."""
    seen = {selector.name for text in on_dashboard() for selector in selectors(promql_parser.parse(text))}
    assert seen == set(EXPORTED)


def test_legends_name_labels_that_the_query_keeps() -> None:
    """A label that was summed away would leave a blank."""
    for target in (target for panel in DASHBOARD["panels"] for target in panel["targets"]):
        named = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        assert named <= kept_labels(filled_in(target["expr"]))


def test_the_dashboards_panels_stand_side_by_side() -> None:
    """Each has a number and a title of its own, and none covers another."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    places = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(places)) == len(places)
    assert max(x for x, _ in places) < 24


def test_the_dashboard_works_with_any_data_source() -> None:
    """Nothing is tied to the Grafana that it was drawn in, and its variables are all there."""
    names = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    text = json.dumps(DASHBOARD)
    used = set(re.findall(r"\$\{?([a-z]\w*)", text))
    assert used == names == {"datasource", "plan"}
    assert set(re.findall(r'"uid": "([^"]*)"', text)) == {"${datasource}", DASHBOARD["uid"]}
    (plan,) = [each for each in DASHBOARD["templating"]["list"] if each["name"] == "plan"]
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", plan["query"]).groups()  # type: ignore[union-attr]
    assert label in EXPORTED[metric]


def test_grafana_asks_for_the_data_source_at_import() -> None:
    """An import of the dashboard asks for a data source, and the dashboard reads from the chosen one."""
    (wanted,) = DASHBOARD["__inputs"]
    assert (wanted["type"], wanted["pluginId"]) == ("datasource", "prometheus")
    (source,) = [each for each in DASHBOARD["templating"]["list"] if each["type"] == "datasource"]
    assert source["current"]["value"] == f"${{{wanted['name']}}}"
    needed = {each["id"] for each in DASHBOARD["__requires"] if each["type"] == "panel"}
    assert needed == {panel["type"] for panel in DASHBOARD["panels"]}


def test_alerts_say_what_happened_and_what_to_do() -> None:
    """Each has a name of its own, an urgency, a sentence for the phone and one for whoever wakes up."""
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert set(rule["annotations"]) == {"summary", "description"}
        named = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule)))
        assert named <= kept_labels(rule["expr"])


def test_every_alert_is_explained() -> None:
    """The page for whoever is on call has each of them, and no other."""
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(RateLimit[A-Z]\w+)`", text)) - {"RateLimitMiddleware"} == {
        rule["alert"] for rule in RULES
    }


def test_prometheus_finds_its_rules() -> None:
    """The files that its configuration names lie beside it."""
    assert PROMETHEUS["rule_files"] == ["alerts.yml"]
    assert (FOLDER / "alerts.yml").is_file()
    assert PROMETHEUS["scrape_configs"][0]["metrics_path"] == "/metrics/"
