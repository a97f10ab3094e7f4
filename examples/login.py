"""A login and a sign-up that stand an attack: wrong passwords are counted for each e-mail address and client.

    uvicorn examples.login:app

Five wrong passwords in 15 minutes close an account's login for as long, wherever they come from, and 20 do it
for a client address. Right ones count nowhere.
"""

import hashlib
import hmac
from pathlib import Path

from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel

from ratelimit_mw import Limit, RateLimitMiddleware, by, limited

app = FastAPI()
app.add_middleware(RateLimitMiddleware, settings=Path(__file__).with_suffix(".toml"))

login_address = Limit("login-address", "20/15 minutes", by=by.address, count="failures")
login_email = Limit("login-email", "5/15 minutes", count="failures")
sign_up_address = Limit("sign-up-address", "3/day", by=by.address, count=lambda status: status == 201)


class Login(BaseModel):
    """The form of both routes."""

    email: str
    password: str


def hashed(password: str) -> bytes:
    """Stands for a slow hash such as Argon2: what an attacker makes a server work on."""
    return hashlib.pbkdf2_hmac("sha256", password.encode(), b"salt of the example", 1_000)


accounts = {"ann@example.com": hashed("correct horse battery staple")}
reached = {"login": 0}


@app.post("/login")
@limited(login_address)
async def login(form: Login, request: Request) -> dict[str, str]:
    """Answer 200 for a right password, 401 for a wrong one."""
    email = form.email.strip().lower()  # or every spelling would have tries of its own
    await request.state.ratelimit.charge(login_email.on(email))
    reached["login"] += 1
    known = accounts.get(email, b"")
    if not hmac.compare_digest(known, hashed(form.password)):
        raise HTTPException(401, "wrong e-mail address or password")
    return {"welcome": email}


@app.post("/sign-up", status_code=201)
@limited(sign_up_address)
async def sign_up(form: Login) -> dict[str, str]:
    """Make an account; three a day from one address."""
    email = form.email.strip().lower()
    if email in accounts:
        raise HTTPException(409, "there is such an account")
    accounts[email] = hashed(form.password)
    return {"welcome": email}


@app.get("/reached")
async def how_many_reached_the_password_check() -> int:
    """Number of logins of this process that got as far as the password."""
    return reached["login"]
