"""Requests of one conversation are told the same slot, on both ways in."""

import json
from typing import Any

import pytest

from tests.backend.peer import answer
from tests.web.site import CHAT, Headers, Site, open_site
from tests.web.test_app import Server
from trio_router.web.outgoing import in_slot


def messages(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]


class Asking:
    """Asks a site, and says which slot its llama-server was told."""

    def __init__(self, site: Site, server: Server, way: Headers) -> None:
        self.site, self.server, self.way = site, server, way

    async def __call__(self, target: str = CHAT, headers: Headers | None = None, **fields: Any) -> int | None:
        sent = {"model": "qwen", **fields}
        reply = await self.site.ask("POST", target, [*self.way, *(headers or [])], json.dumps(sent).encode())
        assert reply.status == 200
        await self.site.until_idle()
        body = self.server.asked[-1].partition(b"\r\n\r\n")[2]
        got = json.loads(body)
        slot: int | None = got.pop("id_slot", None)
        assert got == sent
        assert (slot is None) == (body == json.dumps(sent).encode())
        return slot


async def test_a_conversation_stays_in_its_slot(sockets, way):
    server = Server()
    async with open_site(sockets, server, slots=3) as site:
        ask = Asking(site, server, way)
        first = [await ask(messages=messages(name)) for name in "abc"]
        assert sorted(slot for slot in first if slot is not None) == [0, 1, 2]
        for order in ("cab", "bbca"):
            for name in order:
                assert await ask(messages=messages(name, "answer", "more")) == first["abc".index(name)]


@pytest.mark.parametrize(
    "name",
    ["X-Session-Id", "X-Session-Affinity", "session-id", "X-Claude-Code-Session-Id", "X-Conversation-Id"],
)
async def test_a_client_may_name_it(sockets, way, name):
    server = Server()
    async with open_site(sockets, server, slots=2) as site:
        ask = Asking(site, server, way)
        first = await ask(messages=messages("a"), headers=[(name, "one")])
        assert await ask(messages=messages("b"), headers=[(name, "two")]) != first
        assert await ask(messages=messages("c"), headers=[(name, "one")]) == first


async def test_a_key_in_the_body_names_it(sockets, way):
    server = Server()
    async with open_site(sockets, server, slots=2) as site:
        ask = Asking(site, server, way)
        first = await ask("/v1/responses", input="a", prompt_cache_key="one")
        assert await ask("/v1/responses", input="b", prompt_cache_key="two") != first
        assert await ask("/v1/responses", input="c", prompt_cache_key="one") == first


@pytest.mark.parametrize(
    ("target", "field"),
    [("/v1/completions", "prompt"), ("/infill", "input_prefix"), ("/v1/responses", "input"), ("/completion", "prompt")],
)
async def test_a_text_that_grows(sockets, way, target, field):
    server = Server()
    async with open_site(sockets, server, slots=2) as site:
        ask = Asking(site, server, way)
        slots = {text: await ask(target, **{field: text}) for text in ("Once", "Twice")}
        assert set(slots.values()) == {0, 1}
        for text in ("Twice", "Once", "Twice"):
            assert await ask(target, **{field: f"{text} upon a time"}) == slots[text]


@pytest.mark.parametrize(
    ("target", "fields", "settings"),
    [
        (CHAT, {"messages": messages("a")}, {"slots": 1}),
        (CHAT, {"messages": messages("a")}, {"slots": 33}),
        (CHAT, {"messages": messages("a")}, {"cache_affinity": False}),
        ("/v1/embeddings", {"input": "a"}, {}),
        ("/v1/completions", {"prompt": ["a", "b"]}, {}),  # as many slots as there are
    ],
    ids=["one slot", "too many", "off", "no conversation", "many prompts"],
)
async def test_else_a_body_is_not_touched(sockets, way, target, fields, settings):
    server = Server()
    async with open_site(sockets, server, **{"slots": 2, **settings}) as site:
        assert await Asking(site, server, way)(target, **fields) is None


async def test_slots_that_are_not_ours_are_not_named(sockets, way):
    server = Server()
    async with open_site(sockets, server, slots=2) as site:
        assert site.backend is not None
        site.backend.pins = False
        assert await Asking(site, server, way)(messages=messages("a")) is None


async def test_nobody_waits_for_a_slot_that_suits(sockets, way):
    server = Server(0.3, answer(b"{}"))
    async with open_site(sockets, server, slots=2) as site:
        ask = Asking(site, server, way)
        first = await ask(messages=messages("a"))
        # while somebody else is in its slot
        site.model.scheduler._free.reverse()
        taken = next(slot for slot in site.model.scheduler._free if slot.index == first)
        site.model.scheduler._free.remove(taken)
        assert await ask(messages=messages("a", "answer", "more")) == 1 - (first or 0)
        site.model.scheduler._free.append(taken)


async def test_beside_stop_at_once(sockets):
    server = Server()
    async with open_site(sockets, server, slots=2, stop_at_once=True) as site:
        await site.ask("POST", CHAT, [], json.dumps({"model": "qwen", "messages": messages("a")}).encode())
        got = json.loads(server.asked[-1].partition(b"\r\n\r\n")[2])
        assert got["id_slot"] in {0, 1}
        assert got["return_progress"] is True


def test_a_body_with_its_slot():
    assert in_slot(b'{"a":1}', 3) == b'{"id_slot":3,"a":1}'
    assert in_slot(bytearray(b' \n{ "a": 1 } '), 0) == b' \n{"id_slot":0, "a": 1 } '
    # of fields that come twice, llama-server takes the last: what its client says goes
    assert in_slot(b"{}", 3) == b'{"id_slot":3}'
    assert in_slot(b" {\r\n\t } ", 3) == b' {"id_slot":3\r\n\t } '
    assert json.loads(in_slot(b'{"id_slot":1}', 3)) == {"id_slot": 1}
