"""Steps that a guess of an API key takes: counted, since seconds are the machine's."""

import sys
from types import FrameType

import pytest

from ratelimit_mw._internal.policy.identity import Identifier
from tests.support.asgi import settings_of

KEY = "sk-live-4f9c2a7be01d8365"
SECRETS = {"hashed": "", "under a secret": 'identity.hash_secret = "secret"\n'}
GUESSES = [
    *[KEY[:known] + "#" * (len(KEY) - known) for known in range(len(KEY))],
    KEY.upper(),
    KEY[::-1],
]
"""Guesses as long as the key: right in no character, in the first, the first two, up to all but the last."""


def identifier_of(text: str) -> Identifier:
    """One that knows the key, and has seen it."""
    identifier = Identifier(settings_of(f'{text}plans.pro = {{}}\n[[keys]]\nkey = "{KEY}"\nplan = "pro"\n'))
    assert identifier(scope_of(KEY)).plan == "pro"
    return identifier


def scope_of(api_key: str) -> dict[str, object]:
    """A request with an API key."""
    headers = [(b"host", b"app"), (b"x-api-key", api_key.encode())]
    return {"type": "http", "method": "GET", "path": "/", "headers": headers, "client": ("192.0.2.1", 5)}


def steps_of(identifier: Identifier, api_key: str) -> list[str]:
    """Every function that is called to tell who is calling, of Python and of C, in turn.

    Calls of slipcover are left out: to measure coverage it puts one into each line that no test has met.
    """
    steps: list[str] = []
    scope = scope_of(api_key)

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            steps.append(frame.f_code.co_qualname)
        elif event == "c_call" and "slipcover" not in repr(getattr(argument, "__self__", "")):
            steps.append(getattr(argument, "__qualname__", ""))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        identifier(scope)
    finally:
        sys.setprofile(before)
    return steps[: -1 if steps[-1:] == ["setprofile"] else None]


@pytest.mark.parametrize("kind", SECRETS)
def test_a_better_guess_takes_the_same_steps(kind: str) -> None:
    """However much of a guess is right, the same is done about it: its hash is made, and looked up."""
    steps = {guess: steps_of(identifier_of(SECRETS[kind]), guess) for guess in GUESSES}
    assert len({tuple(each) for each in steps.values()}) == 1, steps
    assert any("hash_api_key" in step for step in steps[GUESSES[0]])


@pytest.mark.parametrize("kind", SECRETS)
def test_a_repeated_guess_takes_the_same_steps(kind: str) -> None:
    """A second try of a guess, which is remembered, tells no more than the first."""
    identifier = identifier_of(SECRETS[kind])
    for guess in GUESSES:
        identifier(scope_of(guess))
    assert len({tuple(steps_of(identifier, guess)) for guess in GUESSES}) == 1
