"""What a browser gets from the page's server, and nothing else."""

import ipaddress
import re
from collections.abc import Awaitable, Callable
from typing import Any


# All that the page needs of Gradio. Its other routes (files, uploads, proxies, documentation) are closed.
OPEN = ("/", "/login", "/logout", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt")
OPEN_BELOW = ("/assets/", "/static/", "/svelte/")
OPEN_API = ("app_id", "cancel", "heartbeat", "login_check", "queue", "reset", "startup-events", "theme.css", "user")
# Nothing is fetched from elsewhere, neither fonts nor scripts.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'; form-action 'self'"


class Guard:
    """
    Lets through what the page needs, and nothing else. Without a password a page that was opened under another name than that
    of this machine is refused: it would be another site's, whose name was pointed here.
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
    """Whether only this machine reaches a host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
