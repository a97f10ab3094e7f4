"""The LLM example, served by uvicorn and asked by the client that its customers have."""

import asyncio

import openai
import pytest

from ratelimit_mw import Limiter
from ratelimit_mw._internal.settings import BackendSettings
from ratelimit_mw._internal.settings.url import SecretURL
from tests.conftest import StartApp
from tests.support.apps import ROOT, AppServer
from tests.support.servers import StoreServer

pytestmark = pytest.mark.rerun

SETTINGS = ROOT / "examples" / "llm.toml"
WORDS = 50
"""Tokens of a prompt, and of its completion: together a tenth of the estimate."""
LIMIT = 60_000


@pytest.fixture
def served(start_app: StartApp, redis_server: StoreServer) -> AppServer:
    """The example, in two worker processes."""
    environment = {"RATELIMIT_BACKEND__URL": redis_server.url, "RATELIMIT_BACKEND__TIMEOUT": "10"}
    return start_app("examples.llm:app", workers=2, environment=environment)


def client_of(served: AppServer, key: str) -> openai.AsyncOpenAI:
    """A customer's client."""
    return openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0, timeout=120)


async def streamed(client: openai.AsyncOpenAI, prompt: str) -> tuple[str, dict[str, str]]:
    """One completion, streamed to its end: the text, and the headers that it began with."""
    raw = await client.chat.completions.with_raw_response.create(
        model="parrot", messages=[{"role": "user", "content": prompt}], stream=True
    )
    text = ""
    async for chunk in raw.parse():
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    return text, {name.lower(): value for name, value in raw.headers.items()}


async def tokens_used(url: str, key: str) -> list[int]:
    """Tokens that a key has used in a minute and in a day, read by another process than the app's."""
    settings = Limiter.from_settings(SETTINGS).settings
    backend = BackendSettings(url=SecretURL(url), timeout=10.0)
    async with Limiter(settings.model_copy(update={"backend": backend})) as reader:
        policy = reader.engine.policies.match(reader.engine.identity_of(api_key=key), "GET", "/")
        return [status.used for _, status in (await reader.engine.peek(policy)).windows("tokens")]


async def test_thirty_at_once_are_bounded_by_what_they_use(
    served: AppServer, redis_server: StoreServer
) -> None:
    """Four rounds estimate twice the limit, ten times what they use, and none has to wait."""
    async with client_of(served, "busy") as client:
        for done in range(4):
            answers = await asyncio.gather(*[streamed(client, "word " * WORDS) for _ in range(30)])
            assert {text for text, _ in answers} == {"word " * WORDS}
            told = [headers for _, headers in answers]
            assert {headers["x-ratelimit-limit-tokens"] for headers in told} == {str(LIMIT)}
            # Of those running at once each is counted with its estimate, those that are done with their use.
            left = min(int(headers["x-ratelimit-remaining-tokens"]) for headers in told)
            before = done * 30 * 2 * WORDS
            assert LIMIT - before - 30_000 <= left <= LIMIT - before - 1_000
    assert await tokens_used(redis_server.url, "busy") == [120 * 2 * WORDS] * 2


async def test_a_customer_is_told_of_tokens(served: AppServer, redis_server: StoreServer) -> None:
    """Tokens used far above the estimate are charged in full; then the client raises the refusal."""
    async with client_of(served, "greedy") as client:
        await client.chat.completions.create(
            model="parrot", messages=[{"role": "user", "content": "w " * 59_500}], max_tokens=100
        )
        assert await tokens_used(redis_server.url, "greedy") == [59_600, 59_600]
        with pytest.raises(openai.RateLimitError) as raised:
            await streamed(client, "word")
    assert isinstance(raised.value.body, dict)
    assert raised.value.body["code"] == "RATE_LIMIT_EXCEEDED"
    assert raised.value.body["details"]["unit"] == "tokens"
    assert raised.value.body["message"] == (
        "Rate limit exceeded. 59600/60000 tokens used in 1 minute; this request needs 1000."
    )
    assert 0 < int(raised.value.response.headers["retry-after"]) <= 60


async def test_a_customer_who_hangs_up_pays_for_what_was_sent(
    served: AppServer, redis_server: StoreServer
) -> None:
    """The stream's end settles it, whoever ends it."""
    async with client_of(served, "gone") as client:
        stream = await client.chat.completions.create(
            model="parrot", messages=[{"role": "user", "content": "word " * 900}], stream=True
        )
        async for _ in stream:
            break
        await stream.close()
    async with asyncio.timeout(60):
        while not 900 < (await tokens_used(redis_server.url, "gone"))[0] <= 1_800:
            await asyncio.sleep(0.05)
