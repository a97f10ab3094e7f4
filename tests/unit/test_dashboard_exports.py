"""The dashboard's files: traffic, callers, routes and changes as CSV and JSON; and all callers."""

import asyncio
import csv
import io

import httpx
import pytest

from ratelimit_mw import Identity, RateLimitMiddleware
from tests.support.asgi import client_of, ok_app
from tests.support.dashboard_client import bearer, settings

NAMES = ("hour", "day", "callers", "routes", "audit")
"""Files with rows in any case; `app-routes` has some only after a page was open for a while."""


async def figures(callers: int = 2) -> httpx.AsyncClient:
    """A client of an app after some traffic: each caller has asked six times, once a refusal."""
    middleware = RateLimitMiddleware(ok_app(), settings=settings(dashboard_changes=True))
    for number in range(callers):
        who = Identity(f"user:{number}", "default", account="=1+1")
        for _ in range(6):
            await middleware.limiter.acquire(identity=who)
    await middleware.limiter.engine.reporter.report()
    return client_of(middleware)


@pytest.mark.parametrize("name", NAMES)
async def test_every_file_is_the_same_in_csv_and_json(name: str) -> None:
    """Both have the same rows and columns, are saved under a name, and need the token."""
    async with await figures() as client:
        await client.post("/ops/plan", headers=bearer(), json={"caller": "ip:192.0.2.9", "plan": "small"})
        asked = await client.get(f"/ops/export/{name}.json", headers=bearer())
        text = await client.get(f"/ops/export/{name}.csv", headers=bearer())
        refused = await client.get(f"/ops/export/{name}.csv")
    rows = list(csv.DictReader(io.StringIO(text.text, newline="")))
    assert rows
    assert [set(row) for row in rows] == [set(row) for row in asked.json()]
    assert text.headers["content-type"] == "text/csv; charset=utf-8"
    assert text.headers["content-disposition"] == f'attachment; filename="ratelimit-{name}.csv"'
    assert refused.status_code == 401


async def test_a_file_without_rows_names_its_columns() -> None:
    """A program that reads CSV finds its columns before there was any traffic."""
    async with client_of(RateLimitMiddleware(ok_app(), settings=settings())) as client:
        for name in ("day", "callers", "routes", "app-routes", "audit"):
            text = (await client.get(f"/ops/export/{name}.csv", headers=bearer())).text
            (columns,) = csv.reader(io.StringIO(text, newline=""))
            assert len(set(columns)) == len(columns) >= 5, name
            assert (await client.get(f"/ops/export/{name}.json", headers=bearer())).json() == []


async def test_files_have_what_the_page_shows() -> None:
    """Sums over time, plans, callers and routes are those of the traffic."""
    async with await figures() as client:
        for name in ("hour", "day", "callers", "routes"):
            rows = (await client.get(f"/ops/export/{name}.json", headers=bearer())).json()
            sums = [sum(row[each] or 0 for row in rows) for each in ("admitted", "refused", "refused_rate")]
            assert sums == [10, 2, 2], name


async def test_the_apps_routes_are_in_a_file_of_their_own_while_a_page_is_open() -> None:
    """Rows by route and method, with their rules; the file is empty before anybody has looked."""
    middleware = RateLimitMiddleware(ok_app(), settings=settings())
    reporter = middleware.limiter.engine.reporter
    async with client_of(middleware) as client, asyncio.timeout(60):

        async def rows(kind: str) -> str:
            return (await client.get(f"/ops/export/app-routes.{kind}", headers=bearer())).text

        assert await rows("json") == "[]"
        await client.get("/before")
        await reporter.report()
        await client.get("/jobs/1")
        await client.post("/jobs/2")
        await reporter.report()
        while await rows("json") == "[]":
            await asyncio.sleep(0.05)
        found = list(csv.DictReader(io.StringIO(await rows("csv"), newline="")))
    told = [(row["route"], row["rule"], int(row["admitted"]) + int(row["refused"])) for row in found]
    assert sorted(told) == [("GET /{rest:path}", "", 1), ("POST /{rest:path}", "", 1)]


async def test_no_cell_is_run_as_a_formula() -> None:
    """A name from outside that a spreadsheet would compute is text there; JSON has it as it is."""
    async with await figures() as client:
        text = (await client.get("/ops/export/callers.csv", headers=bearer())).text
        rows = (await client.get("/ops/export/callers.json", headers=bearer())).json()
    assert {row["account"] for row in csv.DictReader(io.StringIO(text, newline=""))} == {"'=1+1"}
    assert {row["account"] for row in rows} == {"=1+1"}


async def test_all_callers_are_listed_and_some_are_asked_about() -> None:
    """The list has more callers than the overview; those asked about have limits and keep their order."""
    async with await figures(70) as client:
        snapshot = (await client.get("/ops/snapshot", headers=bearer())).json()
        callers = (await client.get("/ops/callers", headers=bearer())).json()["callers"]
        names = [each["caller"] for each in callers]
        assert (len(snapshot["callers"]), snapshot["callers_seen"], len(set(names))) == (50, 70, 70)
        some = names[60:65]
        found = await client.post("/ops/callers", headers=bearer(), json={"names": some})
        assert [each["caller"] for each in found.json()["callers"]] == some
        assert all(each["limits"][0]["used"] == 5 for each in found.json()["callers"])


@pytest.mark.parametrize("names", ["k:1", [1], ["i:x"] * 51, None])
async def test_what_is_no_list_of_names_is_said_to_be_none(names: object) -> None:
    """So many names at a time, each a text."""
    async with await figures(1) as client:
        assert (await client.post("/ops/callers", headers=bearer(), json={"names": names})).status_code == 400
