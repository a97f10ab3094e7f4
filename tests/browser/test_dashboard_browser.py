"""The dashboard in a real browser, under real traffic to two workers on one Redis."""

import os
import re
import signal
from pathlib import Path

import pytest
from playwright.async_api import expect

from tests.conftest import StartApp
from tests.support.apps import AppServer
from tests.support.browser import PATIENCE, browser_page, need_chromium
from tests.support.dashboard_app import HOSTILE, HOSTILE_PLAN
from tests.support.dashboard_pages import answered, ask, cells, log_in, partition, short, traffic
from tests.support.dashboards import SETTINGS, TOKEN, environment
from tests.support.nginx import NginxServer
from tests.support.processes import free_port
from tests.support.servers import StoreServer

pytestmark = [pytest.mark.rerun, pytest.mark.once]

expect.set_options(PATIENCE)


@pytest.fixture(autouse=True)
def chromium() -> None:
    """Each test needs the browser."""
    need_chromium()


@pytest.fixture
def server(tmp_path: Path, start_app: StartApp, redis_server: StoreServer) -> AppServer:
    """Two workers on one Redis."""
    given = environment(tmp_path, redis_server.url)
    return start_app("tests.support.dashboard_app:app", workers=2, environment=given)


async def test_figures_move_and_agree_with_a_count_of_the_traffic(server: AppServer) -> None:
    """From the log-in on: the page follows what two workers decide, and says who is refused."""
    async with browser_page() as page:
        await log_in(page, server, "wrong")
        await expect(page.get_by_role("alert")).to_have_text("This token is wrong.")
        await log_in(page, server)
        await expect(page.locator("#headline-text")).to_have_text("Nobody is being refused")
        await expect(page.locator("#status-workers")).to_have_text("2 workers")
        await expect(page.locator("#status-backend")).to_contain_text("redis up")
        await expect(page.locator("#no-callers")).to_be_visible()
        await ask(server, "early", 3)
        await expect(page.locator(cells(page, "early", "admitted"))).to_have_text("3")
        counted = {key: await ask(server, key, 45) for key in ("steady", "greedy")}
        assert counted["greedy"] == {200: 30, 429: 15}
        for key, answers in counted.items():
            await expect(page.locator(cells(page, key, "admitted"))).to_have_text(str(answers[200]))
            await expect(page.locator(cells(page, key, "refusals"))).to_have_text(str(answers[429]))
        await expect(page.locator("#headline-text")).to_have_text(f"{short('greedy')} is refused most")
        await expect(page.locator("#headline-more")).to_contain_text("15 of its 45 requests")
        await expect(page.locator("#callers tbody tr").first).to_contain_text("most refused")
        await expect(page.locator("#callers tbody tr").first).to_contain_text("30 of 30")
        await expect(page.locator("#kinds tbody tr")).to_have_text(re.compile("request rate.*15"))
        chart = page.get_by_role("img", name="and 15 refused in the last minute")
        await expect(chart.locator("canvas")).to_be_visible()
        await page.get_by_text("The same in numbers").first.click()
        rows = await page.locator("#traffic tbody tr").all_text_contents()
        assert rows
        await page.get_by_role("button", name="Log out").click()
        await expect(page.get_by_label("Token")).to_be_visible()


async def test_a_callers_plan_is_changed_and_taken_back(server: AppServer) -> None:
    """Open who is refused, give it a plan, see every worker go by it; then undo it."""
    async with browser_page() as page:
        await log_in(page, server)
        await ask(server, "greedy", 40)
        await page.locator("#headline a").click()
        await expect(page.locator("#caller-name")).to_have_text(partition("greedy"))
        await expect(page.locator("#limits tbody tr").first).to_contain_text("30 of 30")
        await expect(page.locator("#history canvas")).to_be_visible()
        await page.locator("#plan-name").select_option("big")
        await page.get_by_role("button", name="Give it this plan").click()
        await page.get_by_role("button", name="Cancel").click()
        await expect(page.locator("#done")).to_be_empty()
        await page.locator("#plan-name").select_option("big")
        await page.get_by_role("button", name="Give it this plan").click()
        await page.get_by_role("button", name="Confirm").click()
        await expect(page.locator("#done")).to_contain_text("Plan big is set")
        await answered(server, "greedy", 200)
        await expect(page.locator("#caller-facts")).to_contain_text("big")
        await page.get_by_role("button", name="Take back what was set live").click()
        await page.get_by_role("button", name="Confirm").click()
        await expect(page.locator("#done")).to_contain_text("Taken back")
        await answered(server, "greedy", 429)
        await page.get_by_role("button", name="Clear what is counted").click()
        await page.get_by_role("button", name="Confirm").click()
        await expect(page.locator("#done")).to_contain_text("Cleared")
        await answered(server, "greedy", 200)
        await page.get_by_role("link", name="All callers").click()
        await expect(page.locator("#callers tbody tr").first).to_be_visible()


async def test_a_caller_is_acted_on_from_its_row_and_that_is_undone(server: AppServer) -> None:
    """Ask first, say what was done, offer to undo it; everybody sees who changed what."""
    async with browser_page() as page:
        await log_in(page, server)
        await ask(server, "greedy", 40)
        await page.get_by_role("button", name=f"Act on {short('greedy')}").click()
        await expect(page.locator("#act-title")).to_contain_text(short("greedy"))
        await page.get_by_role("button", name="Cancel").click()
        await expect(page.locator("#audit-card")).to_be_hidden()
        await page.get_by_role("button", name="Act on this caller").click()
        await page.locator("#act-plan").select_option("big")
        await page.get_by_role("button", name="Give it this plan").click()
        await expect(page.locator("#toast")).to_contain_text(f"{short('greedy')}: plan big.")
        await answered(server, "greedy", 200)
        await expect(page.locator("#audit tbody tr").first).to_contain_text("dashboard, 127.0.0.1")
        await page.locator("#toast").get_by_role("button", name="Undo").click()
        await expect(page.locator("#toast")).to_contain_text("undone: plan big")
        await answered(server, "greedy", 429)
        await expect(page.locator("#audit tbody tr")).to_have_count(2)
        await page.get_by_role("button", name=f"Act on {short('greedy')}").click()
        await page.get_by_role("button", name="Clear what is counted").click()
        await expect(page.locator("#toast")).to_contain_text("counters cleared")
        await expect(page.locator("#toast-undo")).to_be_hidden()
        await answered(server, "greedy", 200)


async def test_a_plan_for_a_while_says_until_when_and_who_gave_it(
    tmp_path: Path, start_app: StartApp, redis_server: StoreServer
) -> None:
    """'How long' is what holds, from a row and on the caller's page, and the page shows who is logged in."""
    tokens = """
[[operations.dashboard_tokens]]
name = "Anna"
token = "anna-token"
changes = true
[[operations.dashboard_tokens]]
name = "wall screen"
token = "wall-token"
"""
    given = environment(tmp_path, redis_server.url, SETTINGS + tokens)
    server = start_app("tests.support.dashboard_app:app", environment=given)
    async with browser_page() as page:
        await log_in(page, server, "anna-token")
        await expect(page.locator("#operator")).to_have_text("Anna")
        await ask(server, "greedy", 40)
        await page.get_by_role("button", name="Act on this caller").click()
        await page.locator("#act-plan").select_option("big")
        await page.locator("#act-for").select_option("for an hour")
        await page.get_by_role("button", name="Give it this plan").click()
        await expect(page.locator("#toast")).to_contain_text(f"{short('greedy')}: plan big until ")
        await expect(page.locator("#audit tbody tr").first).to_contain_text("Anna, 127.0.0.1")
        await page.locator("#callers tbody a").click()
        until = page.locator("#caller-facts div", has_text="This plan ends").locator("dd")
        first = await until.text_content()
        await page.locator("#plan-name").select_option("big")
        await page.locator("#plan-for").select_option("for a week")
        await page.locator("#plan-form").get_by_role("button", name="Give it this plan").click()
        await page.get_by_role("button", name="Confirm").click()
        await expect(until).not_to_have_text(first or "")
    async with browser_page() as page:
        await log_in(page, server, "wall-token")
        await expect(page.locator("#operator")).to_have_text("wall screen, read-only")


async def test_a_caller_is_found_among_all(server: AppServer) -> None:
    """By text and plan among those shown, and on the server among all who are known."""
    async with browser_page() as page:
        await log_in(page, server)
        await ask(server, "greedy", 5)
        await ask(server, "other", 5)
        rows = page.locator("#callers tbody tr")
        await expect(rows).to_have_count(2)
        await page.get_by_label("Find").fill(partition("greedy")[:8])
        await expect(rows).to_have_count(1)
        await expect(rows.first).to_contain_text(short("greedy"))
        await expect(page.locator("#callers-number")).to_have_text("1 of 2 in the last minute")
        await page.get_by_label("Find").fill(partition("steady")[:10])
        await expect(page.locator("#no-callers")).to_contain_text("No caller in this list fits")
        await page.locator("#found a").click()
        await expect(page.locator("#caller-name")).to_have_text(partition("steady"))
        await page.get_by_role("link", name="All callers").click()
        await page.get_by_label("Find").fill("")
        await expect(rows).to_have_count(2)
        await page.locator("#find-plan").select_option("big")
        await expect(rows).to_have_count(0)
        await ask(server, "steady", 3)
        await expect(rows).to_have_count(1)


async def test_without_changes_the_page_offers_none(
    tmp_path: Path, start_app: StartApp, redis_server: StoreServer
) -> None:
    """Read-only is what the settings say unless they say otherwise."""
    link = 'logs_url = "https://logs.example.com/?q={caller}"'
    settings = SETTINGS.replace("dashboard_changes = true", link)
    given = environment(tmp_path, redis_server.url, settings)
    server = start_app("tests.support.dashboard_app:app", environment=given)
    async with browser_page() as page:
        await log_in(page, server)
        await ask(server, "steady", 2)
        await page.locator("#callers tbody a").click()
        await expect(page.locator("#limits tbody tr").first).to_be_visible()
        await expect(page.locator("#changes")).to_be_hidden()
        logs = page.get_by_role("link", name="Its logs")
        name = partition("steady").replace(":", "%3A")
        await expect(logs).to_have_attribute("href", f"https://logs.example.com/?q={name}")
        await page.get_by_role("link", name="All callers").click()
        await expect(page.locator("#callers tbody tr").first).to_be_visible()
        assert await page.get_by_role("button", name="Act on").count() == 0


async def test_an_outlook_of_no_time_is_a_sentence(server: AppServer) -> None:
    """A limit with more room within the second says "more left now", and not "in now"."""
    limits: list[dict[str, object]] = [
        {"kind": "window", "share": 1, "reset_after": 0.4},
        {"kind": "window", "share": 1, "reset_after": 30},
        {"kind": "spending", "share": 1, "reset_after": 0.2},
        {"kind": "spending", "share": 0.9, "reset_after": 900, "forecast": 0.5},
        {"kind": "spending", "share": 0.9, "reset_after": 900, "forecast": 42},
    ]
    async with browser_page() as page:
        await log_in(page, server)
        await expect(page.locator("#status-workers")).to_be_visible()
        read = "limits => import(document.querySelector('script[type=module]').src.replace('app', 'format'))"
        texts = await page.evaluate(f"{read}.then(format => limits.map(format.outlook))", limits)
    assert texts == [
        "used up, more left now",
        "used up, more left in 30 s",
        "used up, starts again now",
        "used up now at this pace",
        "used up in 42 s at this pace",
    ]


async def test_it_works_under_another_path_behind_a_proxy(server: AppServer, tmp_path: Path) -> None:
    """Nginx shows it under a path, and to the app under a name, that the app knows nothing of."""
    configuration = tmp_path / "proxy.conf"
    location = f"location /inside/ {{ proxy_pass {server.url}/; }}"
    configuration.write_text(f"events {{}} http {{ server {{ listen 8080; {location} }} }}")
    proxy = NginxServer(configuration, tmp_path / "nginx", {})
    proxy.start()
    try:
        async with browser_page() as page:
            await page.goto(f"{proxy.url}/inside/ops")
            await page.get_by_label("Token").fill(TOKEN)
            await page.get_by_role("button", name="Log in").click()
            await expect(page).to_have_url(f"{proxy.url}/inside/ops/")
            await ask(server, "greedy", 35)
            await expect(page.locator("#headline-text")).to_contain_text(f"{short('greedy')} is refused most")
            assert [cookie.get("path") for cookie in await page.context.cookies()] == ["/inside/ops"]
            await page.locator("#headline a").click()
            await page.get_by_role("button", name="Clear what is counted").click()
            await page.get_by_role("button", name="Confirm").click()
            await expect(page.locator("#done")).to_contain_text("Cleared")
            await page.goto(f"{proxy.url}/inside/ops")
            await expect(page.locator("#status-live")).to_have_text("live")
    finally:
        proxy.stop()


async def test_it_says_that_the_backend_is_away(tmp_path: Path, start_app: StartApp) -> None:
    """From the first moment on, without any figure, and without an error of the page."""
    given = environment(tmp_path, f"redis://127.0.0.1:{free_port()}")
    server = start_app("tests.support.dashboard_app:app", environment=given)
    async with browser_page() as page:
        await log_in(page, server)
        await expect(page.locator("#status-backend")).to_have_text("redis is away")
        await expect(page.locator("#headline-text")).to_have_text(
            re.compile(r"^The backend is away since \d\d:\d\d:\d\d$")
        )
        await expect(page.locator("#headline")).to_have_class("trouble")
        await expect(page.locator("#headline-more")).to_contain_text("Each worker counts alone.")
        await expect(page.locator("#announce")).to_contain_text("The backend is away")


async def test_an_outage_keeps_what_is_known(server: AppServer, redis_server: StoreServer) -> None:
    """The headline says since when and what becomes of requests; a caller's page shows how it was."""
    async with browser_page(has_outage=True) as page:
        await log_in(page, server)
        await ask(server, "greedy", 40)
        await page.locator("#headline a").click()
        await expect(page.locator("#limits tbody tr").first).to_contain_text("30 of 30")
        redis_server.stop_signal()
        await expect(page.locator("#caller-notice")).to_contain_text("he page shows this caller as last seen")
        await expect(page.locator("#limits tbody tr").first).to_contain_text("30 of 30")
        await page.get_by_role("link", name="All callers").click()
        await expect(page.locator("#headline-text")).to_contain_text("The backend is away since")
        await expect(page.locator("#headline-more")).to_contain_text(
            "Each worker counts alone: up to 2 times each limit."
        )
        await expect(page.locator("#callers tbody tr")).to_have_count(1)
        redis_server.continue_signal()
        await expect(page.locator("#headline-text")).not_to_contain_text("away")


async def test_an_outage_mixes_no_two_callers(server: AppServer, redis_server: StoreServer) -> None:
    """A page that is first opened in an outage has its own caller's last figures, and no chart."""
    async with browser_page(has_outage=True) as page:
        await log_in(page, server)
        await ask(server, "greedy", 40)
        await ask(server, "modest", 3)
        await expect(page.locator("#callers tbody tr")).to_have_count(2)
        await page.locator("#headline a").click()
        await expect(page.locator("#limits tbody tr").first).to_contain_text("30 of 30")
        greedy = await page.locator("#caller-name").inner_text()
        await page.get_by_role("link", name="All callers").click()
        redis_server.stop_signal()
        await expect(page.locator("#headline-text")).to_contain_text("The backend is away since")
        await page.locator("#callers tbody tr", has_not_text=greedy[:12]).locator("a").first.click()
        await expect(page.locator("#caller-notice")).to_contain_text("he page shows this caller as last seen")
        assert await page.locator("#caller-name").inner_text() != greedy
        await expect(page.locator("#limits tbody tr").first).to_contain_text("3 of 30")
        facts = page.locator("#caller-facts")
        await expect(facts.locator("div", has_text="Refused in the last minute").locator("dd")).to_have_text(
            "0"
        )
        await expect(page.locator("#history")).to_contain_text("No figures for now.")
        redis_server.continue_signal()
        await expect(page.locator("#caller-notice")).to_be_hidden()


async def test_no_news_stands_over_everything(server: AppServer) -> None:
    """A page whose server says nothing shows since when, and no green anywhere."""
    async with browser_page() as page:
        await log_in(page, server)
        await expect(page.locator("#headline-text")).to_have_text("Nobody is being refused")
        os.killpg(server.pid, signal.SIGSTOP)  # the supervisor, too
        try:
            await expect(page.locator("#headline-text")).to_have_text(
                re.compile(r"^No news from 2 workers since \d\d:\d\d:\d\d$")
            )
            await expect(page.locator("#headline")).to_have_class("trouble")
            await expect(page.locator("#announce")).to_contain_text("No news from 2 workers")
            assert await page.locator("#status .good").count() == 0
        finally:
            os.killpg(server.pid, signal.SIGCONT)
        await expect(page.locator("#headline-text")).to_have_text("Nobody is being refused")
        await expect(page.locator("#status-live.good")).to_be_visible()


async def test_hostile_names_are_shown_and_never_become_markup(
    tmp_path: Path, start_app: StartApp, redis_server: StoreServer
) -> None:
    """Accounts, plans and paths with markup, quotes, line breaks, marks that turn the text, or 10 KB."""
    settings = f"""{SETTINGS}
[plans."{HOSTILE_PLAN}"]
requests = ["3/minute"]
concurrent = 1

[[routes]]
path = "/<img src=x onerror=window.hacked=1>"
requests = ["1/minute"]
"""
    given = environment(tmp_path, redis_server.url, settings)
    server = start_app("tests.support.dashboard_app:hostile_app", workers=2, environment=given)
    callers = [(f"X-Hostile={number}", "/", 0.5) for number in range(len(HOSTILE))]
    async with browser_page(viewport={"width": 1280, "height": 900}) as page, traffic(server, callers):
        await log_in(page, server)
        rows = page.locator("#callers tbody tr")
        await expect(rows).to_have_count(len(HOSTILE))
        await expect(page.locator("#callers")).to_contain_text(HOSTILE[0])
        await expect(page.locator("#callers")).to_contain_text("\\u202egnp.exe\\u2066\\u200f")
        await expect(page.locator("#plans")).to_contain_text(HOSTILE_PLAN)
        await expect(page.locator("#headline-text")).to_contain_text("refused")
        for number in range(len(HOSTILE)):
            await rows.nth(number).locator("a").click()
            await expect(page.locator("#caller-facts")).to_contain_text(HOSTILE_PLAN)
            await expect(page.locator("#limits")).to_contain_text("onerror=window.hacked")
            await page.get_by_role("link", name="All callers").click()
        for name in HOSTILE:
            await page.evaluate("name => { location.hash = 'caller=' + encodeURIComponent(name); }", name)
            await expect(page.locator("#caller-name")).to_contain_text(name[:2])
            await expect(page.locator("#caller-facts")).to_contain_text("Requests a second")
            await page.evaluate("location.hash = ''")
        await page.evaluate("location.hash = 'caller=%E0%A4%A'")  # is not text
        await expect(page.locator("#caller-name")).to_have_text("%E0%A4%A")
        assert await page.evaluate("window.hacked") is None
        assert await page.locator("main img, main svg, main script, main b").count() == 0
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")


async def test_neither_a_frame_nor_another_port_gets_at_it(server: AppServer, start_app: StartApp) -> None:
    """Cookies don't tell ports apart: a page of another app on this host sends the session, in vain."""
    other = start_app("tests.support.dashboard_app:app")
    async with browser_page(is_attacked=True) as page:
        await log_in(page, server)
        await expect(page.locator("#headline-text")).to_have_text("Nobody is being refused")
        evil = await page.context.new_page()
        await evil.goto(other.url)
        await ask(server, "greedy", 35)
        outcomes = await evil.evaluate(
            """async ([url, caller]) => {
                const body = JSON.stringify({caller});
                const outcomes = [];
                for (const mode of ["cors", "no-cors"]) {
                    const init = {mode, credentials: "include"};
                    for (const ask of [
                        fetch(`${url}/ops/reset`, {...init, method: "POST", body}),
                        fetch(`${url}/ops/snapshot`, init),
                    ]) outcomes.push(await ask.then(() => "read", () => "failed"));
                }
                return outcomes;
            }""",
            [server.url, partition("greedy")],
        )
        assert outcomes == ["failed"] * 4
        assert await ask(server, "greedy", 1) == {429: 1}
        await evil.evaluate(
            """url => new Promise((resolve) => {
                const frame = document.createElement("iframe");
                frame.src = `${url}/ops/`;
                frame.onload = resolve;
                document.body.append(frame);
            })""",
            server.url,
        )
        assert await evil.frames[1].locator("#headline").count() == 0


async def test_it_works_with_the_keyboard_and_names_everything(server: AppServer) -> None:
    """Focus is visible, stays where it is while figures move, and goes to the heading of a page it opens."""
    async with browser_page(reduced_motion="reduce") as page:
        await page.goto(f"{server.url}/ops")
        await expect(page.get_by_label("Token")).to_be_focused()
        await page.keyboard.type(TOKEN)
        await page.keyboard.press("Enter")
        await ask(server, "greedy", 35)
        await expect(page.locator("#announce")).to_contain_text(re.compile("refus"))
        await expect(page.locator("#callers tbody tr")).to_have_count(1)
        link = page.locator("#callers tbody a")
        for _ in range(20):
            await page.keyboard.press("Tab")
            if await link.evaluate("each => each === document.activeElement"):
                break
        await ask(server, "steady", 50)
        await expect(page.locator("#callers tbody tr")).to_have_count(2)
        await expect(link.first).to_be_focused()
        outline = await link.first.evaluate("each => getComputedStyle(each).outlineStyle")
        assert outline == "solid"
        await page.keyboard.press("Enter")
        await expect(page.locator("#caller-name")).to_be_focused()
        await expect(page).to_have_title(re.compile("^k:.*: rate limits$"))
        await page.go_back()
        await expect(page.locator("#overview")).to_be_visible()
        unnamed = await page.evaluate(
            """() => [...document.querySelectorAll("button, a, select, input, main table")].filter((each) => {
                if (each.tagName === "TABLE") return !each.querySelector("th");
                return !each.textContent.trim() && !each.labels?.length;
            }).length"""
        )
        assert unnamed == 0
        moving = "[...document.querySelectorAll('.fill')].map(e => getComputedStyle(e).transitionDuration)"
        assert set(await page.evaluate(moving)) == {"0s"}
