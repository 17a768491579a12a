"""Authentication with API keys. Every path requires a key except those in PUBLIC and PUBLIC_FOLDERS.

The public paths contain no data of users: health checks, the web page and its examples, and the description of the API.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from animediffusion.platform.api_keys import Keyring
from animediffusion.serve.api.problems import ProblemError, respond

PUBLIC = ("/", "/page.css", "/docs", "/openapi.json", "/examples", "/healthz", "/readyz")
PUBLIC_FOLDERS = ("/examples/", "/scripts/")
REALM = 'Bearer realm="animediffusion"'


class KeyAuthentication:
    """ASGI middleware that answers 401 without a valid key, and stores the name of a valid key in the request's state.

    Args:
        app: the application.
        keyring: the accepted keys; every request is accepted while `keyring.is_closed` is false.
    """

    def __init__(self, app: ASGIApp, keyring: Keyring) -> None:
        self.app = app
        self.keyring = keyring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] == "http" and self.keyring.is_closed and not _is_public(scope):
            token = _token(Headers(scope=scope).get("authorization", ""))
            name = self.keyring.name_of(token) if token else None
            if name is None:
                await respond(_unauthorized(token), scope, receive, send)
                return
            scope["state"]["key"] = name
        await self.app(scope, receive, send)


def key_of(request: Request) -> str:
    """Return the name of the request's API key; empty if the server requires no key."""
    return str(getattr(request.state, "key", ""))


def _is_public(scope: Scope) -> bool:
    path = str(scope["path"]).removeprefix(str(scope.get("root_path", ""))) or "/"
    return path in PUBLIC or path.startswith(PUBLIC_FOLDERS)


def _token(header: str) -> str:
    scheme, _, token = header.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _unauthorized(token: str) -> ProblemError:
    """Return a 401 with an error code only if the request contained a key, as RFC 6750 requires."""
    if not token:
        detail = "this server requires a key; send the header Authorization: Bearer KEY"
        return ProblemError(401, detail, headers={"WWW-Authenticate": REALM})
    detail = "this key is unknown or revoked; ask the operator of the server for another"
    return ProblemError(401, detail, headers={"WWW-Authenticate": f'{REALM}, error="invalid_token"'})
