"""A client: creates predictions, comes back when it is told to, and polls until they are done.

python -m examples.predictions.client http://127.0.0.1:8000 alice "one two three" "four five six"
"""

import asyncio
import sys

import httpx

POLL_SECONDS = 0.5


async def send(client: httpx.AsyncClient, request: httpx.Request, prompt: str) -> httpx.Response:
    """Send a request, and again when its refusal says to come back: polling is limited, too."""
    answer = await client.send(request)
    while answer.status_code == 429:
        print(f"{prompt!r}: {answer.json()['error']['message']}", flush=True)
        if answer.headers.get("x-should-retry") == "false":
            break
        await asyncio.sleep(int(answer.headers["retry-after-ms"]) / 1000)
        answer = await client.send(request)
    return answer.raise_for_status()


async def predict(client: httpx.AsyncClient, prompt: str) -> str:
    """Create a prediction and wait for its output."""
    answer = await send(client, client.build_request("POST", "/v1/predictions", content=prompt), prompt)
    poll = client.build_request("GET", answer.headers["Location"])
    prediction = answer.json()
    while prediction["status"] in ("queued", "running"):
        await asyncio.sleep(POLL_SECONDS)
        prediction = (await send(client, poll, prompt)).json()
    return f"{prompt!r}: {prediction['status']}: {prediction['output']}"


async def main(url: str, api_key: str, *prompts: str) -> None:
    """Ask for all predictions at once."""
    async with httpx.AsyncClient(base_url=url, headers={"X-API-Key": api_key}) as client:
        for done in asyncio.as_completed([predict(client, prompt) for prompt in prompts]):
            print(await done, flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
