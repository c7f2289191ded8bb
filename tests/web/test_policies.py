"""What is done to a request's body on its way, whichever way it comes."""

import json

from tests.web.site import BODY, CHAT, open_site, request
from tests.web.test_app import Server
from trio_router.config.policies import ModelPolicy, Policy
from trio_router.config.schema import KeyConfig

POLICY = ModelPolicy(
    aliases=("gpt-4o",),
    set={"temperature": 0.5},
    variants={"wild": Policy(name="Wild", set={"temperature": 1.5}, strip=("seed",))},
)


def sent(server: Server) -> bytes:
    head, _, body = server.asked[-1].partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in head.lower()
    return body


def asking(model: str, more: bytes = b"") -> bytes:
    return b'{"model":"%b","messages":[ ] %b}' % (model.encode(), more)


async def test_another_name_alone_changes_no_byte(sockets, way):
    server = Server()
    policy = ModelPolicy(aliases=("gpt-4o",), name="Q", description="d", variants={"same": Policy()})
    async with open_site(sockets, server, policy=policy) as site:
        for model in ("qwen", "gpt-4o", "qwen:same"):
            reply = await site.ask("POST", CHAT, way, asking(model, b', "x": 1.50'))
            assert (reply.status, sent(server)) == (200, asking(model, b', "x": 1.50'))
        assert (await site.ask("POST", CHAT, way, asking("qwen:other"))).code == (404, "model_not_found")
        assert {event.alias for event in await site.told(3)} == {"qwen", None}


async def test_a_model_its_other_name_and_its_variant(sockets, way):
    server = Server()
    async with open_site(sockets, server, policy=POLICY) as site, site.client() as client:
        for model, temperature in (("qwen", 0.5), ("gpt-4o", 0.5), ("qwen:wild", 1.5)):
            reply = await client.ask("POST", CHAT, way, asking(model, b',"seed":1,"temperature":0'))
            assert reply.status == 200
            seed = {} if model == "qwen:wild" else {"seed": 1}
            assert json.loads(sent(server)) == {"model": model, "messages": [], **seed, "temperature": temperature}


async def test_the_default_model_may_be_a_variant(sockets, way):
    server = Server()
    async with open_site(sockets, server, policy=POLICY, default_model="qwen:wild") as site:
        for body in (b"{}", asking("nobody")):
            assert (await site.ask("POST", CHAT, way, body)).status == 200
            assert json.loads(sent(server))["temperature"] == 1.5
        assert (await site.ask("POST", CHAT, way, BODY)).status == 200
        assert json.loads(sent(server))["temperature"] == 0.5


async def test_upstream_is_no_way_round(sockets):
    server = Server()
    async with open_site(sockets, server, policy=POLICY) as site:
        for model, temperature in (("qwen", 0.5), ("qwen:wild", 1.5), ("gpt-4o", 0.5)):
            assert (await site.ask("POST", f"/upstream/{model}{CHAT}", [], b'{"messages":[]}')).status == 200
            assert json.loads(sent(server)) == {"messages": [], "temperature": temperature}
        assert (await site.ask("POST", f"/upstream/qwen{CHAT}", [], b"[")).code == (400, "invalid_json")


async def test_keep_alive_is_ours(sockets, way):
    server = Server()
    async with open_site(sockets, server) as site, site.client() as client:
        for said, seconds in ((b'"5m"', 300.0), (b"0", 0.0), (b"-1", float("inf")), (b"null", None)):
            reply = await client.ask("POST", CHAT, way, asking("qwen", b',"keep_alive":%b' % said))
            assert (reply.status, sent(server)) == (200, b'{"model":"qwen","messages":[ ]}')
            assert site.model.keep_seconds == seconds
        await client.ask("POST", CHAT, way, asking("qwen", b',"keep_alive":9'))
        await client.ask("POST", CHAT, way, BODY)
        assert (site.model.keep_seconds, sent(server)) == (None, BODY)
        reply = await client.ask("POST", CHAT, way, asking("qwen", b',"keep_alive":"soon"'))
        assert reply.code == (400, "invalid_keep_alive")


async def test_a_key_may_be_for_a_variant_alone(sockets, way):
    keys = (KeyConfig(name="k", key="sk", models=("qwen:wild",)), KeyConfig(name="all", key="sa", models=("qwen",)))
    async with open_site(sockets, Server(), policy=POLICY, keys=keys) as site:

        async def ask(key: str, model: str) -> int:
            return (await site.ask("POST", CHAT, [*way, ("Authorization", f"Bearer {key}")], asking(model))).status

        assert [await ask("sk", model) for model in ("qwen:wild", "qwen", "gpt-4o")] == [200, 403, 403]
        assert [await ask("sa", model) for model in ("qwen:wild", "qwen", "gpt-4o")] == [200, 200, 200]


async def test_what_there_is(sockets):
    async with open_site(sockets, policy=POLICY) as site:
        found = json.loads((await site.ask("GET", "/v1/models")).body)["data"]
        assert [entry["id"] for entry in found] == ["qwen", "qwen:wild"]
        assert [entry.get("name") for entry in found] == [None, "Wild"]
        assert [entry["aliases"] for entry in found] == [["gpt-4o"], []]
        for said in ("qwen", "gpt-4o", "qwen:wild"):
            assert json.loads((await site.ask("GET", f"/v1/models/{said}")).body)["id"] == said
            status = json.loads((await site.ask("GET", f"/v1/models/{said}/status")).body)
            assert (status["alias"], status["model"]) == ("qwen", said)
        assert len(json.loads((await site.ask("GET", "/models")).body)["data"]) == 2


async def test_a_body_is_changed_once_however_often_it_is_sent(sockets, way):
    """The connection that llama-server closed while it was idle is no reason to do it again."""
    server = Server()
    async with open_site(sockets, server, policy=POLICY) as site, site.client() as client:
        for _ in range(2):
            await client.say(request("POST", CHAT, way, asking("qwen", b',"temperature":9')))
            assert (await client.hear("POST")).status == 200
            site.backend.slots[0].disconnect()
        assert {asked.partition(b"\r\n\r\n")[2] for asked in server.asked} == {
            b'{"model":"qwen","messages":[ ],"temperature":0.5}'
        }
