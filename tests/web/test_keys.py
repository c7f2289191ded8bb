"""Keys on both ways in: whose request it is, and what it may."""

import hashlib
import json

import pytest
import trio

from tests.backend.peer import answer, read_request, until
from tests.web.site import BODY, CHAT, open_site
from trio_router.config.schema import ApiConfig, KeyConfig, PriorityBound
from trio_router.web.admission import Admission
from trio_router.web.keys import Holder

APP = KeyConfig(
    name="app", key="sk-app", models=("qwen",), max_priority=PriorityBound.NORMAL, max_concurrency=1
)  # fmt: skip
BOSS = KeyConfig(name="boss", key_sha256=hashlib.sha256(b"sk-boss").hexdigest().upper(), admin=True)
ELSEWHERE = KeyConfig(name="elsewhere", key="sk-elsewhere", models=())
KEYS = (APP, BOSS, ELSEWHERE)
COMMANDS = ["/v1/models/load?wait=false", "/v1/models/eject", "/v1/models/qwen/reset"]


def bearing(key: str) -> list[tuple[str, str]]:
    return [("Authorization", f"Bearer {key}")]


class Gate:
    """A llama-server that answers when it is let to."""

    def __init__(self) -> None:
        self.asked = 0
        self.open = trio.Event()

    async def __call__(self, stream: trio.SocketStream) -> None:
        while await read_request(stream):
            self.asked += 1
            await self.open.wait()
            await stream.send_all(answer())


async def prompt(stream: trio.SocketStream) -> None:
    while await read_request(stream):
        await stream.send_all(answer())


@pytest.mark.parametrize(("key", "name"), [("sk-app", "app"), ("sk-boss", "boss")])
async def test_a_key_or_its_hash(tmp_path, way, key, name):
    async with open_site(tmp_path, prompt, keys=KEYS) as site:
        reply = await site.ask("POST", CHAT, [*way, *bearing(key)], BODY)
        assert (reply.status, reply.body) == (200, b"{}")
        reply = await site.ask("POST", CHAT, [*way, ("X-Api-Key", key)], BODY)
        assert reply.status == 200
        assert [event.key for event in await site.told(2)] == [name, name]


@pytest.mark.parametrize("headers", [[], bearing("sk-App"), bearing(BOSS.key_sha256), [("X-Api-Key", "")]])
async def test_none_of_them(tmp_path, way, headers):
    async with open_site(tmp_path, prompt, keys=KEYS) as site:
        reply = await site.ask("POST", CHAT, [*way, *headers], BODY)
        assert reply.code == (401, "invalid_api_key")


async def test_a_model_that_is_not_the_keys(tmp_path, way):
    async with open_site(tmp_path, prompt, keys=KEYS) as site:
        reply = await site.ask("POST", CHAT, [*way, *bearing("sk-elsewhere")], BODY)
        assert reply.code == (403, "model_not_allowed")
        assert "sk-elsewhere" not in reply.error["message"]


async def test_priority_is_bounded(tmp_path, way):
    async with open_site(tmp_path, prompt, keys=KEYS) as site:
        for count, (asked, given) in enumerate((("high", "normal"), ("normal", "normal"), ("low", "low")), 1):
            headers = [*way, *bearing("sk-app"), ("X-Request-Priority", asked)]
            assert (await site.ask("POST", CHAT, headers, BODY)).status == 200
            assert (await site.told(count))[-1].priority == given


async def test_one_more_than_it_may(tmp_path, way):
    gate = Gate()
    async with open_site(tmp_path, gate, slots=4, keys=KEYS) as site, trio.open_nursery() as nursery:
        for _ in range(3):
            gate.open, gate.asked = trio.Event(), 0
            nursery.start_soon(site.ask, "POST", CHAT, [*way, *bearing("sk-app")], BODY)
            await until(lambda: gate.asked)
            reply = await site.ask("POST", CHAT, [*way, *bearing("sk-app")], BODY)
            assert reply.code == (429, "too_many_requests")
            gate.open.set()
            assert (await site.ask("POST", CHAT, [*way, *bearing("sk-boss")], BODY)).status == 200
            await site.until_idle()


@pytest.mark.parametrize("body", [b"{", b'{"model":"none"}', BODY])
async def test_whatever_ends_a_request_it_is_counted_no_longer(tmp_path, way, body):
    """A key of one request at a time goes on after errors and after clients that left."""
    gate = Gate()
    async with open_site(tmp_path, gate, keys=KEYS, slots=4) as site:
        for _ in range(3):
            async with site.client() as client:
                head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n"
                head += "".join(f"{name}: {value}\r\n" for name, value in [*way, *bearing("sk-app")])
                await client.say(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                if body == BODY:
                    await until(lambda: gate.asked)
                    gate.asked = 0
                else:
                    assert (await client.hear()).status in {400, 404}
            await site.until_idle()
        gate.open.set()
        assert (await site.ask("POST", CHAT, [*way, *bearing("sk-app")], BODY)).status == 200


@pytest.mark.parametrize("path", COMMANDS)
async def test_commands_need_an_admin(tmp_path, path):
    async with open_site(tmp_path, prompt, keys=KEYS) as site:
        body = b'{"model":"qwen"}' if "qwen" not in path else b""
        if "eject" in path:
            body = b'{"model":"none"}'
        reply = await site.ask("POST", path, bearing("sk-app"), body)
        assert reply.code == (403, "admin_required")
        assert (await site.ask("POST", path, bearing("sk-boss"), body)).status in {200, 202, 404}


async def test_reading_needs_any_key(tmp_path):
    async with open_site(tmp_path, prompt, keys=KEYS) as site:
        assert (await site.ask("GET", "/v1/models", bearing("sk-elsewhere"))).status == 200
        assert (await site.ask("GET", "/v1/models")).code == (401, "invalid_api_key")
        assert (await site.ask("GET", "/health")).status == 200
        described = json.loads((await site.ask("GET", "/openapi.json", bearing("sk-app"))).body)
        assert described["security"]


async def test_names_and_no_keys_in_metrics(tmp_path):
    async with open_site(tmp_path, prompt, keys=KEYS, api={"key": "sk-env"}) as site:
        for key in ("sk-app", "sk-boss", "sk-env"):
            await site.ask("POST", CHAT, bearing(key), BODY)
        await site.told(3)
        text = (await site.ask("GET", "/metrics", bearing("sk-boss"))).body.decode()
        for name in ("app", "boss", "API_KEY"):
            assert f'router_key_requests_total{{key="{name}",outcome="ok"}} 1.0' in text
        assert "sk-" not in text
        assert "sk-" not in repr(site.connections.plane.admission)


def test_the_key_of_the_environment_may_do_everything():
    admission = Admission(ApiConfig(key="sk-env"), KEYS)
    holder = admission.check_key("/v1/models", "Bearer sk-env", None)
    assert isinstance(holder, Holder)
    holder.check_admin()
    assert holder.name == "API_KEY"


def test_what_runs_is_still_counted_after_a_renewal():
    admission = Admission(ApiConfig(), KEYS)
    before = admission.check_key("/x", "Bearer sk-app", None)
    before.running = 1
    admission.renew(ApiConfig(), (KeyConfig(name="app", key="sk-new"),))
    after = admission.check_key("/x", "Bearer sk-new", None)
    assert after is before
    assert after.config.max_concurrency is None
    admission.renew(ApiConfig(), ())
    assert not admission.needs_key
    assert admission.check_key("/x", None, None) is None


@pytest.mark.parametrize(
    "below",
    [
        "/v1/chat/completions%3Fx=/completion", "/x/../completion", "/./completion", "/completion%23/completion",
        "/lora-adapters%3Fx=/completion", "/slots/0%3Faction=erase&x=/completion",
    ],
)  # fmt: skip
async def test_upstream_is_no_way_round_a_keys_bounds(tmp_path, below):
    async with open_site(tmp_path, prompt, keys=KEYS) as site:
        for key in ("sk-app", "sk-elsewhere"):
            reply = await site.ask("POST", f"/upstream/qwen{below}", bearing(key), BODY)
            assert reply.code == (403, "admin_required")


@pytest.mark.parametrize("target", ["/props?model=qwen", "/slots?model=qwen", "/upstream/qwen/slots"])
async def test_reading_of_a_model_that_is_not_the_keys_loads_none(tmp_path, target):
    async with open_site(tmp_path, prompt, keys=KEYS) as site:
        assert (await site.ask("GET", target, bearing("sk-elsewhere"))).code == (403, "model_not_allowed")


@pytest.mark.parametrize("below", ["/x/../slots", "/./slots", "//evil.example/slots", "//[::1", "//:80:x"])
async def test_upstream_takes_no_path_that_is_another_one(tmp_path, below):
    async with open_site(tmp_path, prompt, keys=KEYS) as site:
        assert (await site.ask("GET", f"/upstream/qwen{below}", bearing("sk-boss"))).code == (404, "not_found")


async def test_a_plan_is_for_whoever_asks(tmp_path):
    """What would become of the request of this key."""
    async with open_site(tmp_path, prompt, keys=KEYS) as site:
        wish = b'{"model":"qwen","priority":"high"}'
        assert (
            json.loads((await site.ask("POST", "/v1/router/plan", bearing("sk-app"), wish)).body)["priority"]
            == "normal"
        )
        assert (
            json.loads((await site.ask("POST", "/v1/router/plan", bearing("sk-boss"), wish)).body)["priority"] == "high"
        )
        reply = await site.ask("POST", "/v1/router/plan", bearing("sk-elsewhere"), wish)
        assert reply.code == (403, "model_not_allowed")
