"""Restricts the server of the rating page to what the page needs, and slows down those who guess its password."""

import asyncio
import ipaddress
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any


# The routes of Gradio that the page needs. The others (files, uploads, proxies, documentation) are closed.
OPEN = ("/", "/login", "/logout", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt")
OPEN_BELOW = ("/assets/", "/static/", "/svelte/")
OPEN_API = ("app_id", "cancel", "heartbeat", "login_check", "queue", "reset", "startup-events", "theme.css", "user")
# Nothing is loaded from other hosts, including fonts and scripts.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'; form-action 'self'"


class LoginThrottle:
    """
    Slows down guesses of the password. An address has five attempts; each further one must wait twice as long as the
    one before, from one second to five minutes. When many attempts fail, from whatever addresses, every attempt takes
    longer, up to five seconds. A right password always works after that; it clears its address.

    An attempt counts as failed until it has succeeded, so that many at once are no way around. The addresses of the
    latest attempts are kept, at most `max_addresses` of them.

    Args:
        clock (`Callable`, *optional*, defaults to `time.monotonic`):
            Returns the time in seconds.
        max_addresses (`int`, *optional*, defaults to `4096`):
            Number of addresses that are kept.
    """

    FREE = 5  # attempts of an address without a pause
    LONGEST = 300.0  # seconds that an address waits
    FORGET = 3600.0  # seconds without an attempt after which an address starts over

    def __init__(self, clock: Callable[[], float] = time.monotonic, max_addresses: int = 4096):
        self.clock = clock
        self.max_addresses = max_addresses
        self.failed: OrderedDict[str, tuple[int, float]] = OrderedDict()  # number of failures, and the last one's time
        self.recent = (0.0, clock())  # failures of all addresses, which count half after a minute

    def attempt(self, address: str) -> tuple[float, float]:
        """
        Counts an attempt. Returns the seconds after which the address may try again, 0 if this one is let through, and
        the seconds by which this one is delayed.
        """
        now, key = self.clock(), _network(address)
        count, last = self.failed.get(key, (0, now))
        if now - last > self.FORGET:
            count = 0
        pause = min(2.0 ** (count - self.FREE), self.LONGEST) if count >= self.FREE else 0.0
        if now < last + pause:
            return last + pause - now, 0.0
        self.failed[key] = (count + 1, now)
        self.failed.move_to_end(key)
        if len(self.failed) > self.max_addresses:
            self.failed.popitem(last=False)
        others = self._recent(now)
        self.recent = (others + 1, now)
        return 0.0, min(5.0, others / 20) if others > 20 else 0.0

    def succeed(self, address: str) -> None:
        """Takes back the attempts of an address that knew the password."""
        now = self.clock()
        self.failed.pop(_network(address), None)
        self.recent = (max(0.0, self._recent(now) - 1), now)

    def _recent(self, now: float) -> float:
        count, then = self.recent
        return count * 0.5 ** ((now - then) / 60)


def _network(address: str) -> str:
    """The address; of IPv6 the network of 64 bits, which one subscriber has for himself."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if parsed.version == 6 and parsed.ipv4_mapped is None:
        return str(ipaddress.ip_network((int(parsed) >> 64 << 64, 64)))
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)


class Guard:
    """
    ASGI middleware that serves only the routes that the page needs, answers no website of others that a browser has
    open, and slows down wrong passwords.

    Args:
        app (`Callable`):
            The application.
        local_only (`bool`):
            Whether to refuse requests for other host names than this machine's. Otherwise a website could point its
            own name here and read the page (DNS rebinding).
        throttle ([`LoginThrottle`], *optional*):
            Counts wrong passwords.
        sleep (`Callable`, *optional*, defaults to `asyncio.sleep`):
            Waits for some seconds.
    """

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        local_only: bool,
        throttle: LoginThrottle | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ):
        self.app = app
        self.local_only = local_only
        self.throttle = throttle or LoginThrottle()
        self.sleep = sleep

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        path = scope["path"]
        api = path.removeprefix("/gradio_api/").split("/")[0] if path.startswith("/gradio_api/") else None
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        here = headers.get(b"host", "")
        host = re.sub(r":\d+$", "", here)
        # A browser names the website that sends a form. A proxy may have replaced the host; a website cannot.
        origin = headers.get(b"origin", f"//{here}").partition("//")[2]
        is_foreign = scope["method"] not in ("GET", "HEAD") and origin not in (here, headers.get(b"x-forwarded-host"))
        status = 200
        if ".." in path or not (path in OPEN or path.startswith(OPEN_BELOW) or api in OPEN_API):
            status = 404
        elif is_foreign or (self.local_only and not is_loopback(host)):
            status = 403

        address, pause = (scope.get("client") or ("unknown", 0))[0], 0.0
        is_login = status == 200 and path == "/login" and scope["method"] == "POST"
        if is_login:
            pause, delay = self.throttle.attempt(address)
            if pause:
                status = 429
            elif delay:
                await self.sleep(delay)

        async def send_with_policy(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                if is_login and message["status"] < 400:
                    self.throttle.succeed(address)
                added = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        if status == 200:
            await self.app(scope, receive, send_with_policy)
        else:
            replied, body = [(b"content-type", b"text/plain")], b"Not served here."
            if status == 429:
                replied.append((b"retry-after", str(int(pause) + 1).encode()))
                body = b"Too many wrong passwords. Wait, then try again."
            await send({"type": "http.response.start", "status": status, "headers": replied})
            await send({"type": "http.response.body", "body": body})


def is_loopback(host: str) -> bool:
    """Returns whether a host can only be reached from this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
