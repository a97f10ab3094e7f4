"""A client: creates predictions, comes back when it is told to, and polls until they are done.

python -m examples.predictions.client http://127.0.0.1:8000 alice "one two three" "four five six"
"""

import asyncio
import sys

import httpx

POLL_SECONDS = 0.2


async def predict(client: httpx.AsyncClient, prompt: str) -> str:
    """Create a prediction and wait for its output."""
    answer = await client.post("/v1/predictions", content=prompt)
    while answer.status_code == 429:
        print(f"{prompt!r}: {answer.json()['error']['message']}", flush=True)
        if answer.headers.get("x-should-retry") == "false":
            break
        await asyncio.sleep(int(answer.headers["retry-after-ms"]) / 1000)
        answer = await client.post("/v1/predictions", content=prompt)
    answer.raise_for_status()
    prediction = answer.json()
    while prediction["status"] in ("queued", "running"):
        await asyncio.sleep(POLL_SECONDS)
        prediction = (await client.get(answer.headers["Location"])).raise_for_status().json()
    return f"{prompt!r}: {prediction['status']}: {prediction['output']}"


async def main(url: str, api_key: str, *prompts: str) -> None:
    """Ask for all predictions at once."""
    async with httpx.AsyncClient(base_url=url, headers={"X-API-Key": api_key}) as client:
        for done in asyncio.as_completed([predict(client, prompt) for prompt in prompts]):
            print(await done, flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
