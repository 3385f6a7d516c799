"""Restricts the server of the rating page to what the page needs."""

import ipaddress
import re
from collections.abc import Awaitable, Callable
from typing import Any


# The routes of Gradio that the page needs. The others (files, uploads, proxies, documentation) are closed.
OPEN = ("/", "/login", "/logout", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt")
OPEN_BELOW = ("/assets/", "/static/", "/svelte/")
OPEN_API = ("app_id", "cancel", "heartbeat", "login_check", "queue", "reset", "startup-events", "theme.css", "user")
# Nothing is loaded from other hosts, including fonts and scripts.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'; form-action 'self'"


class Guard:
    """
    ASGI middleware that serves only the routes that the page needs.

    Args:
        app (`Callable`):
            The application.
        local_only (`bool`):
            Whether to refuse requests for other host names than this machine's. Otherwise a website could point its
            own name here and read the page (DNS rebinding).
    """

    def __init__(self, app: Callable[..., Awaitable[None]], local_only: bool):
        self.app = app
        self.local_only = local_only

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        path = scope["path"]
        api = path.removeprefix("/gradio_api/").split("/")[0] if path.startswith("/gradio_api/") else None
        host = re.sub(r":\d+$", "", dict(scope["headers"]).get(b"host", b"").decode("latin-1"))
        status = 200
        if ".." in path or not (path in OPEN or path.startswith(OPEN_BELOW) or api in OPEN_API):
            status = 404
        elif self.local_only and not is_loopback(host):
            status = 403

        async def send_with_policy(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message["headers"], *headers]}
            await send(message)

        if status == 200:
            await self.app(scope, receive, send_with_policy)
        else:
            await send(
                {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]}
            )
            await send({"type": "http.response.body", "body": b"Not served here."})


def is_loopback(host: str) -> bool:
    """Returns whether a host can only be reached from this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
