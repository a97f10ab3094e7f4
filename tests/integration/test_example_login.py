"""The login example under attack: wrong passwords at once, on several workers and servers of each kind."""

import asyncio
from collections import Counter

import httpx
import pytest

from tests.conftest import StartApp
from tests.support.servers import StoreServer
from tests.support.topologies import Cluster

pytestmark = [pytest.mark.rerun, pytest.mark.once]

WRONG = {"email": "ann@example.com", "password": "guess"}
RIGHT = {"email": " Ann@Example.com", "password": "correct horse battery staple"}


async def attacked(url: str, tries: int) -> Counter[int]:
    """Return how many of so many wrong passwords at once got each status."""
    at_once = asyncio.Semaphore(100)  # waiting in httpx's own pool takes it a look at all who wait, each time
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def tried() -> httpx.Response:
            async with at_once:
                return await client.post("/login", json=WRONG)

        answers = await asyncio.gather(*[tried() for _ in range(tries)])
        for answer in answers:
            if answer.status_code == 429:
                # By either limit: twenty tries of one address may run at once.
                assert answer.json()["error"]["details"]["policy"] in {"login-email", "login-address"}
                assert 0 < int(answer.headers["retry-after"]) <= 900
        return Counter(answer.status_code for answer in answers)


def environment(url: str) -> dict[str, str]:
    """The backend at this address, and patience for a busy machine."""
    return {"RATELIMIT_BACKEND__URL": url, "RATELIMIT_BACKEND__TIMEOUT": "20"}


async def test_five_of_a_thousand_wrong_passwords_get_through(
    start_app: StartApp, server: StoreServer
) -> None:
    """Two workers together let five tries reach the password; a right one is refused as long."""
    app = start_app("examples.login:app", workers=2, environment=environment(server.url))
    assert await attacked(app.url, 1_000) == {401: 5, 429: 995}
    async with httpx.AsyncClient(base_url=app.url, timeout=60) as client:
        assert (await client.post("/login", json=RIGHT)).status_code == 429
        others = [await client.post("/login", json={**WRONG, "email": f"{n}@x"}) for n in range(15)]
        assert [answer.status_code for answer in others] == [401] * 15
        refused = await client.post("/login", json={**WRONG, "email": "other@x"})
        assert refused.json()["error"]["details"]["policy"] == "login-address", (
            "twenty failures of the address"
        )


async def test_an_attack_on_a_cluster(start_app: StartApp, cluster: Cluster) -> None:
    """On a cluster, where address and e-mail address lie on several nodes, no more get through."""
    app = start_app("examples.login:app", environment=environment(cluster.url))
    assert await attacked(app.url, 200) == {401: 5, 429: 195}


async def test_right_passwords_and_sign_ups(start_app: StartApp) -> None:
    """Right passwords count nowhere, and sign-ups only where an account was made."""
    app = start_app("examples.login:app")
    async with httpx.AsyncClient(base_url=app.url, timeout=60) as client:
        for _ in range(4):
            assert (await client.post("/login", json=WRONG)).status_code == 401
        assert [(await client.post("/login", json=RIGHT)).status_code for _ in range(30)] == [200] * 30
        forms = [{"email": f"{n}@x", "password": "p"} for n in (0, 0, 0, 1, 2, 3)]
        found = [(await client.post("/sign-up", json=form)).status_code for form in forms]
        assert found == [201, 409, 409, 201, 201, 429]
