import asyncio

from hp_edit_trl.calibration.guard import Guard, LoginThrottle


class Page:
    """A page behind the guard, with a clock that the test moves."""

    def __init__(self, **options):
        self.now, self.asked, self.slept = 0.0, 0, []
        self.throttle = LoginThrottle(clock=lambda: self.now, **options)

        async def sleep(seconds):
            self.slept.append(seconds)
            self.now += seconds

        self.guard = Guard(self.app, local_only=False, throttle=self.throttle, sleep=sleep)

    async def app(self, scope, receive, send):
        self.asked += 1
        status = 200 if scope["password"] == "right" else 400
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def post(self, password, address="10.0.0.1", method="POST", path="/login", **headers):
        return asyncio.run(self._post(password, address, method, path, headers))

    async def _post(self, password, address, method, path, headers=()):
        sent = []

        async def send(message):
            sent.append(message)

        client = None if address is None else (address, 1)
        headers = [(name.replace("_", "-").encode(), value.encode()) for name, value in dict(headers).items()]
        scope = {"type": "http", "path": path, "method": method, "client": client, "password": password}
        scope["headers"] = headers
        await self.guard(scope, None, send)
        return sent[0]["status"]


def test_guesses_of_an_address_become_slow_and_others_are_let_in():
    page = Page()
    assert [page.post("wrong") for _ in range(7)] == [400] * 5 + [429] * 2 and page.asked == 5
    assert page.post("right", "10.0.0.2") == 200  # of another address
    assert page.post("right") == 429  # what is guessed is not even looked at
    page.now += 1.0
    assert page.post("wrong") == 400 and page.post("wrong") == 429
    page.now += 1.9
    assert page.post("wrong") == 429
    page.now += 0.2
    assert page.post("right") == 200 and page.post("wrong") == 400  # it starts over
    # In a day
    page, guesses = Page(), 0
    for _ in range(24 * 3600):
        page.now += 1
        guesses += page.throttle.attempt("10.0.0.1")[0] == 0
    assert 280 <= guesses <= 310


def test_the_page_itself_is_not_slowed_down():
    page = Page()
    for _ in range(20):
        page.post("wrong")
    assert page.post("right", method="GET") == 200 and page.post("right", path="/config") == 200


def test_guesses_from_many_addresses_become_slow_but_the_right_password_works():
    page = Page(max_addresses=100)
    for i in range(2000):
        assert page.post("wrong", f"10.{i % 250}.{i // 250}.1") == 400
    assert len(page.throttle.failed) == 100
    assert 1 < max(page.slept) <= 5.0 and page.now > 1000  # the clock moves by the pauses alone
    for i in range(500):
        page.throttle.attempt(f"11.0.{i}.1")
    page.post("wrong")
    assert page.slept[-1] == 5.0
    assert page.post("right", "10.0.0.2") == 200 and page.slept[-1] <= 5.0
    page.now += 1200
    slept = len(page.slept)
    assert page.post("right", "10.0.0.3") == 200 and len(page.slept) == slept


def test_a_network_of_ipv6_is_one_address_and_a_mapped_one_is_that_of_ipv4():
    page = Page()
    assert [page.post("wrong", f"2001:db8:1:2::{i:x}") for i in range(7)] == [400] * 5 + [429] * 2
    assert page.post("wrong", "2001:db8:1:3::1") == 400
    assert [page.post("wrong", a) for a in ["10.0.0.9", "::ffff:10.0.0.9"] * 3] == [400] * 5 + [429]
    assert [page.post("wrong", None) for _ in range(6)] == [400] * 5 + [429]


def test_many_guesses_at_once_are_no_way_around():
    page = Page()

    async def at_once():
        return await asyncio.gather(*(page._post("wrong", "10.0.0.1", "POST", "/login") for _ in range(50)))

    assert sorted(asyncio.run(at_once())) == [400] * 5 + [429] * 45


def test_a_website_of_others_cannot_rate_or_guess():
    page, queue = Page(), "/gradio_api/queue/join"
    own = {"host": "localhost:7860", "origin": "http://localhost:7860"}
    assert page.post("right", path=queue, **own) == 200 and page.post("right", path=queue, host="localhost") == 200
    for origin in ("https://evil.org", "null", "http://localhost:8000", "http://localhost:7860.evil.org", ""):
        assert page.post("right", path=queue, **own | {"origin": origin}) == 403, origin
        assert page.post("right", **own | {"origin": origin}) == 403
    proxied = {"host": "127.0.0.1:7860", "origin": "https://rate.org"}
    assert page.post("right", path=queue, **proxied, x_forwarded_host="rate.org") == 200
    assert page.post("right", path=queue, **proxied) == 403
    assert page.post("right", path="/config", method="GET", **own | {"origin": "https://evil.org"}) == 200
