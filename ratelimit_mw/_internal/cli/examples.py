"""Examples of each command, as its help shows them."""

from typing import Any

_EXAMPLES = {
    "check": ("check ratelimit.toml", "check ratelimit.toml --json"),
    "schema": ("schema > ratelimit.schema.json",),
    "explain": (
        "explain POST /v1/predictions --key k:621bf7aa",
        "explain GET /v1/models --address 192.0.2.1",
    ),
    "show": ("show", "show k:621bf7aa", "show --account acme --json"),
    "reset": ("reset k:621bf7aa", "reset --address 192.0.2.1"),
    "routes": ("routes main:app", "routes main:app --settings ratelimit.toml --json"),
    "top": ("top", "top --sort refused -n 5", "top --plan pro --filter acme --once"),
    "audit": ("audit", "audit -n 100 --json"),
    "demo": ("demo", "demo --port 8001 --no-traffic"),
    "hash": ("keys hash -", "keys hash k:621bf7aa"),
    "set": (
        "keys set k:621bf7aa --plan trickle",
        'keys set - --plan pro --account acme --label "Acme, batch" --requests 200/minute',
        "keys set a:acme --plan enterprise",
        "keys set 203.0.113.0/24 --plan blocked --for 2h",
    ),
    "list": ("keys list", "keys list --json"),
    "remove": ("keys remove k:621bf7aa", "keys remove 203.0.113.0/24"),
    "keys": ("keys list", "keys set k:621bf7aa --plan pro"),
    "": ("check ratelimit.toml", "top", "show k:621bf7aa", "keys set k:621bf7aa --plan pro"),
}


def examples(name: str) -> tuple[str, ...]:
    """The examples of a command, each as it is typed."""
    return tuple(f"ratelimit-mw {line}" for line in _EXAMPLES[name])


def with_examples(name: str) -> dict[str, Any]:
    """The option of a command that shows its examples below its help."""
    # The first character keeps the lines as they are.
    return {"epilog": "\n".join(("\b", "Examples:", *(f"  {line}" for line in examples(name))))}
