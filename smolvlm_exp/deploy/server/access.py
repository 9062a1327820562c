"""Who may use the server: whoever works on this machine, or has the key."""

import os
import re
import secrets
from contextlib import suppress
from ipaddress import ip_address

from starlette import types
from starlette.datastructures import Headers

from smolvlm_exp.deploy.server.errors import error_response
from smolvlm_exp.utils.errors import RequestError

VARIABLE = "SMOLVLM_EXP_API_KEY"  # of the environment: settings are saved with every run
KEY = re.compile(r"[!-~]{16,}")
OPEN = ("/", "/health")  # the page asks for the key itself


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to `host`."""
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost"


def api_key(host: str) -> str:
    """The key that clients have to send, from the environment; empty: none. RequestError where `host` needs one."""
    key = os.environ.get(VARIABLE, "")
    if key and not KEY.fullmatch(key):
        raise RequestError(
            f"{VARIABLE}: a key has at least 16 letters, digits or ASCII signs, and no spaces.\n{advice()}"
        )
    if not key and not is_loopback(host):
        raise RequestError(
            f"serve.host={host} lets others connect, and no key is set. Leave serve.host out, or set one.\n{advice()}"
        )
    return key


def advice() -> str:
    return f"A new one: export {VARIABLE}={secrets.token_urlsafe(24)}"


def require_key(app: types.ASGIApp, key: str) -> types.ASGIApp:
    """Middleware that refuses requests without the key before anything else of them is read."""

    async def checked(scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not secrets.compare_digest(given.strip().encode(), key.encode()):
                message = f"a key is needed: Authorization: Bearer KEY, with the server's {VARIABLE}."
                response = error_response(401, message, headers={"WWW-Authenticate": "Bearer"})
                return await response(scope, receive, send)
        return await app(scope, receive, send)

    return checked
