"""Lets in who has a key. Everything asks for one except what PUBLIC names; a path that nobody thought of asks, too.

What is public tells nothing of anybody: whether the server lives, the page and its examples, the API's description.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from animediffusion.platform.api_keys import Keyring
from animediffusion.serve.api.problems import ProblemError, respond

PAGE_FILES = ("/page.css", "/page.js", "/colorize.js", "/key.js")
PUBLIC = ("/", *PAGE_FILES, "/docs", "/openapi.json", "/examples", "/healthz", "/readyz")
PUBLIC_FOLDER = "/examples/"
REALM = 'Bearer realm="animediffusion"'


class KeyGate:
    """ASGI middleware: 401 without a key that is known; puts the key's name into the request's state.

    Args:
        app: what is behind.
        keyring: lets everybody in while no key was ever made.
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
                await respond(_refusal(token), scope, receive, send)
                return
            scope["state"]["key"] = name
        await self.app(scope, receive, send)


def _is_public(scope: Scope) -> bool:
    path = str(scope["path"]).removeprefix(str(scope.get("root_path", ""))) or "/"
    return path in PUBLIC or path.startswith(PUBLIC_FOLDER)


def _token(header: str) -> str:
    scheme, _, token = header.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _refusal(token: str) -> ProblemError:
    """As RFC 6750 has it: an error code only for who sent a key."""
    if not token:
        detail = "this server asks for a key; send the header Authorization: Bearer KEY"
        return ProblemError(401, detail, headers={"WWW-Authenticate": REALM})
    detail = "this key is not known, or was revoked; ask whoever runs the server for another"
    return ProblemError(401, detail, headers={"WWW-Authenticate": f'{REALM}, error="invalid_token"'})
