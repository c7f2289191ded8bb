"""A low request that gave its slot to a high one goes on where it was, and its client sees one answer."""

import json
from typing import Any

import pytest
import trio

from tests.backend.peer import answer, until
from tests.web.site import CHAT, Headers, Reply, open_site, request
from tests.web.test_app import STREAM, Server, chunk
from tests.web.test_stoppable import TEXT, chat, events, progress, text
from trio_router.fleet.ticket import Priority, Ticket
from trio_router.web.admission import read_wish
from trio_router.web.continuing import Continuing, NotContinued, Part

LOW, HIGH = ([("X-Request-Priority", priority)] for priority in ("low", "high"))
OTHER = answer(b'{"ok":true}', headers=b"Content-Type: application/json\r\n")
QUESTION = {"role": "user", "content": "Wie?"}
BEGIN = chat({"role": "assistant", "content": None})


def timings(made: int, *, cached: int = 0, read: int = 9) -> dict[str, Any]:
    return {
        "timings": {
            "cache_n": cached, "prompt_n": read, "prompt_ms": 4.5, "prompt_per_token_ms": 0.5, "prompt_per_second": 2.0,
            "predicted_n": made, "predicted_ms": made * 2.0, "predicted_per_token_ms": 2.0, "predicted_per_second": 0.5,
        }
    }  # fmt: skip


def end(made: int, **more: int) -> dict[str, Any]:
    """The last event of a chat."""
    used = {"completion_tokens": made, "prompt_tokens": 99, "total_tokens": 99 + made}
    usage = {**used, "prompt_tokens_details": {"cached_tokens": 98}}
    return {**BEGIN, "choices": [], "usage": usage, **timings(made, **more)}


def token(said: str, made: int, **more: Any) -> dict[str, Any]:
    return chat({"content": said}, **more) | timings(made)


class Interrupted(Server):
    """What it says to each try of the low one; after the first ones, all but the last, nothing more until it is cut."""

    def __init__(self, *tries: bytes, hangs: int | None = None) -> None:
        super().__init__()
        self.tries = tries
        self.hangs = len(tries) - 1 if hangs is None else hangs
        self.low = 0

    @property
    def pieces(self):
        if b'"high"' in self.asked[-1]:
            return (OTHER,)
        self.low += 1
        said = self.tries[self.low - 1]
        if self.low <= self.hangs:
            return STREAM, chunk(said), trio.Event()
        return (STREAM, chunk(said), b"0\r\n\r\n") if said.startswith(b"data:") else (said,)

    @pieces.setter
    def pieces(self, _) -> None:
        """There is no choice."""

    def bodies(self) -> list[dict[str, Any]]:
        """What the low one was asked for, each time."""
        found = [json.loads(asked.partition(b"\r\n\r\n")[2]) for asked in self.asked]
        return [body for body in found if body.get("user") != "high"]


async def interrupted(
    sockets, way: Headers, server: Interrupted, path: str, body: dict[str, Any], *, times: int = 1
) -> Reply:
    """The low one's answer, after so many high ones."""
    async with open_site(sockets, server, preempt_low=True) as site, site.client() as low:
        await low.say(request("POST", path, [*way, *LOW], json.dumps({"model": "qwen", **body}).encode()))
        for number in range(1, times + 1):
            await until(lambda number=number: server.low == number)
            await trio.sleep(0.05)  # what it says has come
            other = json.dumps({"model": "qwen", "messages": [], "user": "high"}).encode()
            assert (await site.ask("POST", CHAT, [*way, *HIGH], other)).status == 200
        with trio.fail_after(10):
            reply = await low.hear("POST")
        assert server.cut == times
        return reply


async def test_a_chat_goes_on(sockets, way):
    server = Interrupted(
        events(progress(1), BEGIN, token("Grü", 1), token('ße "', 2)),
        events(
            BEGIN, chat({"content": 'Grüße "'}) | progress(1) | {"choices": chat({"content": 'Grüße "'})["choices"]},
            progress(9), BEGIN, token("an", 1), token("\n", 2),
        ),
        events(BEGIN, chat({"content": 'Grüße "an\n'}), BEGIN, token("alle", 1), chat({}, finish="stop"), end(1, cached=16, read=1)),
    )  # fmt: skip
    asked = {"messages": [QUESTION], "max_tokens": 20, "n_predict": 10, "temperature": 0}
    reply = await interrupted(sockets, way, server, CHAT, asked, times=2)
    found = json.loads(reply.body)
    assert found["choices"] == [
        {"finish_reason": "stop", "index": 0, "message": {"role": "assistant", "content": 'Grüße "an\nalle'}}
    ]
    assert found["usage"] == {
        "completion_tokens": 5, "prompt_tokens": 9, "total_tokens": 14, "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    assert found["timings"] == {
        "cache_n": 0, "prompt_n": 19, "prompt_ms": 13.5, "prompt_per_token_ms": 13.5 / 19, "prompt_per_second": 19000 / 13.5,
        "predicted_n": 5, "predicted_ms": 10.0, "predicted_per_token_ms": 2.0, "predicted_per_second": 500.0,
    }  # fmt: skip
    first, second, third = server.bodies()
    assert first["messages"] == [QUESTION]
    assert first["timings_per_token"] is True
    assert second == first | {
        "messages": [QUESTION, {"role": "assistant", "content": 'Grüße "'}], "max_tokens": 18, "n_predict": 8,
    }  # fmt: skip
    assert third == first | {
        "messages": [QUESTION, {"role": "assistant", "content": 'Grüße "an\n'}], "max_tokens": 16, "n_predict": 6,
    }  # fmt: skip


async def test_a_completion_goes_on(sockets, way):
    def said(what: str, made: int) -> dict[str, Any]:
        return text(what) | timings(made)

    usage = {"usage": {"completion_tokens": 1, "prompt_tokens": 12, "total_tokens": 13}}
    server = Interrupted(
        events(said(" upon", 1), said(" a", 2)),
        events(said(" time", 1)),
        events(said(".", 1), text("", finish="stop") | usage | timings(1)),
    )
    reply = await interrupted(sockets, way, server, TEXT, {"prompt": "Once"}, times=2)
    found = json.loads(reply.body)
    assert found["choices"] == [{"text": " upon a time.", "index": 0, "logprobs": None, "finish_reason": "stop"}]
    assert found["usage"] == {"completion_tokens": 4, "prompt_tokens": 9, "total_tokens": 13}
    assert [body["prompt"] for body in server.bodies()] == ["Once", "Once upon a", "Once upon a time"]


REFUSAL = answer(
    b'{"error":{"code":400,"message":"Assistant response prefill is incompatible with enable_thinking."}}',
    "400 Bad Request",
    b"Content-Type: application/json\r\n",
)
AGAIN = events(BEGIN, token("neu", 1), chat({}, finish="stop"), end(1))


@pytest.mark.parametrize(
    "second",
    [
        REFUSAL,
        events(BEGIN, token("Alt", 1)),
        events(BEGIN, chat({}, finish="stop"), end(1)),
        events({"error": {"code": 500, "message": "no"}}),
    ],
    ids=["refused", "answered anew", "nothing said", "an error"],
)
async def test_what_does_not_go_on_begins_anew(sockets, way, second):
    server = Interrupted(events(BEGIN, token("alt", 1)), second, AGAIN, AGAIN, hangs=1)
    async with open_site(sockets, server, preempt_low=True) as site, site.client() as low:
        body = json.dumps({"model": "qwen", "messages": [QUESTION]}).encode()
        await low.say(request("POST", CHAT, [*way, *LOW], body))
        await until(lambda: server.low == 1)
        await trio.sleep(0.05)
        other = json.dumps({"model": "qwen", "messages": [], "user": "high"}).encode()
        assert (await site.ask("POST", CHAT, [*way, *HIGH], other)).status == 200
        with trio.fail_after(10):
            reply = await low.hear("POST")
        assert json.loads(reply.body)["choices"][0]["message"]["content"] == "neu"
        assert [len(body["messages"]) for body in server.bodies()] == [1, 2, 1]
        assert site.registry.models["qwen"].scheduler.backend.beginning == {CHAT}, "nothing is kept from then on"


def of(path: str, body: dict[str, Any]) -> Continuing | None:
    data = json.dumps({"model": "m", **body}).encode()
    talk = read_wish(data, talk=True).talk
    assert talk is not None
    return Continuing.of(ticket(), path, data, talk)


def ticket() -> Ticket:
    return Ticket(alias="m", priority=Priority.LOW, arrived_at=0.0, deadline=1.0, key=0.0, yielded=True)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [QUESTION], "tools": []}),
        (CHAT, {"messages": [QUESTION], "n": 1}),
        (CHAT, {"messages": [QUESTION], "seed": 1}),
        (CHAT, {"messages": [QUESTION], "response_format": {"type": "json_object"}}),
        (CHAT, {"messages": [QUESTION], "grammar": "root ::= 'a'"}),
        (CHAT, {"messages": [QUESTION], "anything": 1}),
        (CHAT, {"messages": [QUESTION, {"role": "assistant", "content": "I"}]}),
        (CHAT, {"messages": []}),
        (CHAT, {"messages": "no"}),
        (CHAT, {}),
        (TEXT, {"prompt": ["a"]}),
        (TEXT, {"prompt": [1, 2]}),
        (TEXT, {"prompt": "a", "echo": True}),
        (TEXT, {"prompt": "a", "suffix": "b"}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/messages", {"messages": [QUESTION]}),
    ],
)
def test_what_begins_anew_when_it_is_interrupted(path, body):
    assert of(path, body) is None


def part(said: bytes, made: int) -> Part:
    return Part(text=said, timings=timings(made)["timings"])


def test_an_answer_that_is_all_there_is_not_gone_on_with():
    found = of(TEXT, {"prompt": "a", "max_tokens": 4})
    assert found is not None
    found.keep(part(b"bcde", 4))
    assert found.body is found.source
    found.keep(part(b"bcd", 3))
    found.keep(part(b"e", 1))
    assert json.loads(found.body) == {"model": "m", "prompt": "abcd", "max_tokens": 1}
    found.ticket.yielded = False  # it was not we who interrupted
    found.keep(part(b"x", 0))
    assert found.text == b"bcd"


def test_how_it_is_known_that_a_chat_goes_on():
    found = of(CHAT, {"messages": [QUESTION], "max_tokens": -1})
    assert found is not None
    assert found.check(b"whatever")
    found.keep(part(b"Yes, ", 2))
    assert json.loads(found.body)["max_tokens"] == -1
    assert [found.check(said) for said in (b"", b"Yes", b"Yes, ", b"Yes, I")] == [False, False, True, True]
    with pytest.raises(NotContinued):
        found.check(b"No")
