"""Requests that llama-server is asked for in pieces: what goes out, and what comes back as the client asked for it.

That the whole is what llama-server writes itself, byte by byte, is shown against the real one in `tests/e2e`.
"""

import json
from typing import Any

import pytest
import trio

from tests.backend.peer import answer, linked, read_request, say
from tests.web.site import BODY, CHAT, WAYS, open_site
from tests.web.test_app import STREAM, Server, chunk
from trio_router.backend.answer import AnswerHead
from trio_router.backend.connection import BackendLost
from trio_router.web.admission import read_wish
from trio_router.web.assembly import MAX_EVENT_BYTES, Assembly, KeptBack, NotWhole, ResponseAssembly, Whole
from trio_router.web.message_assembly import MessageAssembly
from trio_router.web.native_assembly import NativeAssembly
from trio_router.web.stoppable import CHATS, MESSAGES, PATHS, RESPONSES, Stoppable

TEXT = "/v1/completions"
ENDS: dict[str, Any] = {"created": 2, "id": "chatcmpl-1", "model": "m", "system_fingerprint": "b1"}


def events(*found: Any) -> bytes:
    """As llama-server writes them: in order, without blanks."""
    lines = [
        each if isinstance(each, str) else json.dumps(each, separators=(",", ":"), ensure_ascii=False) for each in found
    ]
    return "".join(f"data: {line}\n\n" for line in lines).encode()


def chat(delta: Any, *, index: int = 0, finish: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"finish_reason": finish, "index": index, "delta": delta, **more}
    return {"choices": [choice], **ENDS, "object": "chat.completion.chunk"}


def usage(count: int) -> dict[str, Any]:
    timings = {"predicted_ms": float(f"{count}.000000000000001")}
    return {
        "choices": [],
        **ENDS,
        "object": "chat.completion.chunk",
        "usage": {"completion_tokens": count},
        "timings": timings,
    }


def call(index: int, arguments: str, **first: Any) -> dict[str, Any]:
    """A piece of the call of a tool."""
    function: dict[str, Any] = {"arguments": arguments}
    if first:
        function = {"name": first.pop("name"), **function}
        first["type"] = "function"
    return chat({"tool_calls": [{"index": index, **first, "function": function}]})


def progress(count: int) -> dict[str, Any]:
    return chat({"role": "assistant", "content": None}) | {"prompt_progress": {"total": 9, "processed": count}}


def text(said: str, *, index: int = 0, finish: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"text": said, "index": index, "logprobs": None, "finish_reason": finish}
    return {"choices": [choice | more], **ENDS, "object": "text_completion"}


def assembled(stream: bytes, size: int = 1_000_000, assembly: Whole | None = None) -> tuple[int, bytes]:
    assembly = assembly or Assembly()
    for at in range(0, len(stream), size):
        assembly.feed(stream[at : at + size])
    return assembly.whole()


BEGIN = chat({"role": "assistant", "content": None})
FOOT = '"created":2,"model":"m","system_fingerprint":"b1","object":"chat.completion","usage":{"completion_tokens":3},"id":"chatcmpl-1","timings":{"predicted_ms":3.000000000000001}'


def of(path: str, body: bytes | bytearray) -> Stoppable | None:
    wish = read_wish(body, talk=True)
    assert wish.talk is not None
    return Stoppable.of(path, body, wish.talk, stream=wish.stream)


@pytest.mark.parametrize("path", sorted(PATHS))
def test_what_is_asked_for(path):
    whole = of(path, b'{"model":"m","stream":false, "x":1} \r\n')
    assert whole is not None
    assert whole.whole
    found = json.loads(whole.body)  # as llama-server does, Python takes the last of a field that comes twice
    counts = {"timings_per_token": True} if path in CHATS | RESPONSES else {}
    assert found == {
        "model": "m", "x": 1, "stream": True, "stream_options": {"include_usage": True}, "return_progress": True, **counts,
    }  # fmt: skip
    for more in (b"", b'"tools":[],', b'"functions":[],') if path not in MESSAGES else ():
        stream = of(path, bytearray(b'{"model":"m",%b"stream":true}' % more))
        assert stream is not None
        assert not stream.whole
        assert stream.body == b'{"model":"m",%b"stream":true,"return_progress":true}' % more


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, b'{"model":"m","return_progress":true}'),
        (CHAT, b'{"model":"m","return_progress":false,"stream":true}'),
        (CHAT, b'{"model":"m","n":2,"stream":true}'),
        (TEXT, b'{"model":"m","prompt":["a","b"],"stream":true}'),
        (TEXT, b'{"model":"m","n_cmpl":2,"stream":true}'),
        ("/v1/messages", b'{"model":"m","stream":true}'),
        ("/completion", b'{"model":"m","prompt":["a","b"]}'),
        ("/completion", b'{"model":"m","response_fields":["content"]}'),
        ("/completion", b'{"model":"m","return_tokens":true}'),
        ("/infill", b'{"model":"m","n_cmpl":2}'),
        (CHAT, b'{"model":"m","logprobs":true}'),
        (CHAT, b'{"model":"m","top_logprobs":3,"logprobs":false}'),
        (TEXT, b'{"model":"m","logprobs":1}'),
        ("/completion", b'{"model":"m","n_probs":1}'),
        (CHAT, b'{"model":"m","continue_final_message":"content"}'),
        (CHAT, b'{"model":"m","verbose":true}'),
        ("/v1/responses", b'{"model":"m","n":2}'),
        ("/v1/responses", b'{"model":"m","timings_per_token":true,"stream":true}'),
        ("/v1/embeddings", BODY),
    ],
)
def test_what_is_sent_as_it_is(path, body):
    assert of(path, body) is None


@pytest.mark.parametrize(
    "body", [b'"n":1', b'"n":null', b'"n_cmpl":1', b'"prompt":{"id":"x"}', b'"stream":true,"timings_per_token":false']
)
def test_one_response_is_no_list(body):
    assert of("/v1/responses", b'{"model":"m",%b}' % body) is not None


def test_what_says_nothing_is_no_reason():
    for body in (b'"logprobs":false', b'"logprobs":null,"top_logprobs":null', b'"n_probs":0', b'"verbose":false'):
        assert of(CHAT, b'{"model":"m",%b}' % body) is not None
    assert of(CHAT, b'{"model":"m","logprobs":true,"stream":true}') is not None


def test_several_answers_in_one_piece_can_be_put_together():
    for body in (b'{"model":"m","n":2}', b'{"model":"m","prompt":["a"]}', b'{"model":"m","prompt":"a","stream":true}'):
        assert of(TEXT, body) is not None


def test_words_in_a_text_are_no_fields():
    body = json.dumps({"model": "m", "messages": [{"content": 'the "tools" and', "tools": 1}], "x": "tools"}).encode()
    found = of(CHAT, body)
    assert found is not None
    assert not found.tools


@pytest.mark.parametrize(
    "body", [b'{"model":"m","tools":[]}', b'{"model":"m","t\\u006fols":[]}', b'{"model":"m","functions":[]}']
)
def test_tools_are_another_matter(body):
    found = of(CHAT, body)
    assert found is not None
    assert found.tools
    assert found.name == f"{CHAT} with tools"
    found.check(AnswerHead(status=200, headers=[], length=3))
    with pytest.raises(NotWhole) as caught:
        found.check(AnswerHead(status=400, headers=[], length=3))
    assert not caught.value.ever


def test_what_has_to_wait_for_its_prompt():
    assert [path for path in PATHS if not Stoppable(path, b"{}", whole=True).in_prompt] == ["/v1/messages"]


@pytest.mark.parametrize(
    ("stream", "whole"),
    [
        (
            events(
                progress(1), "null", progress(9), BEGIN, chat({"content": "Grü"}), chat({"content": 'ße "\\\n'}),
                chat({}, finish="stop"), usage(3), "[DONE]",
            ),
            '{"choices":[{"finish_reason":"stop","index":0,"message":{"role":"assistant","content":"Grüße \\"\\\\\\n"}}],' + FOOT + "}",
        ),
        (
            events(  # what a client gave it to go on with comes with a line on progress
                BEGIN, progress(1) | {"choices": chat({"content": "a"})["choices"]}, progress(9), BEGIN, chat({"content": "b"}),
                chat({}, finish="stop"), usage(3), "[DONE]",
            ),
            '{"choices":[{"finish_reason":"stop","index":0,"message":{"role":"assistant","content":"ab"}}],' + FOOT + "}",
        ),
        (
            events(BEGIN, chat({}, finish="stop"), usage(3), "[DONE]"),
            '{"choices":[{"finish_reason":"stop","index":0,"message":{"role":"assistant","content":""}}],' + FOOT + "}",
        ),
        (
            events(
                BEGIN, chat({"reasoning_content": "h"}), chat({"reasoning_content": "m"}), chat({"content": "ok"}),
                chat({}, finish="length"), usage(3), "[DONE]",
            ),
            '{"choices":[{"finish_reason":"length","index":0,"message":{"role":"assistant","content":"ok",'
            '"reasoning_content":"hm"}}],' + FOOT + "}",
        ),
        (
            events(
                BEGIN, call(0, '{"a":', id="x", name="f"), call(1, "", id="y", name="g"), call(1, '"}'), call(0, '"Ö'),
                call(0, '"}'), chat({}, finish="tool_calls"), usage(3),
            ),
            '{"choices":[{"finish_reason":"tool_calls","index":0,"message":{"role":"assistant","content":"","tool_calls":['
            '{"type":"function","function":{"name":"f","arguments":"{\\"a\\":\\"Ö\\"}"},"id":"x"},'
            '{"type":"function","function":{"name":"g","arguments":"\\"}"},"id":"y"}]}}],' + FOOT + "}",
        ),
        (
            events(
                BEGIN, chat({"reasoning_content": "h"}), chat({"content": "a"}), call(0, "{}", id="x", name="f"),
                chat({}, finish="tool_calls"), usage(3),
            ),
            '{"choices":[{"finish_reason":"tool_calls","index":0,"message":{"role":"assistant","content":"a",'
            '"reasoning_content":"h","tool_calls":[{"type":"function","function":{"name":"f","arguments":"{}"},"id":"x"}]}}],'
            + FOOT + "}",
        ),
        (
            events(
                chat({"role": "assistant", "content": None}, index=1), BEGIN, chat({"content": "b"}, index=1),
                chat({"content": "a"}), chat({}, index=0, finish="stop"), usage(3), chat({}, index=1, finish="length"), usage(7),
            ),
            '{"choices":[{"finish_reason":"stop","index":0,"message":{"role":"assistant","content":"a"}},'
            '{"finish_reason":"length","index":1,"message":{"role":"assistant","content":"b"}}],' + FOOT + "}",
        ),
        (
            events(
                text("a"), text("", finish="length") | {"usage": {"completion_tokens": 3}, "timings": {"x": 1}, "extra": [1]},
            ),
            ('{"choices":[{"text":"a","index":0,"logprobs":null,"finish_reason":"length"}],"created":2,"model":"m",'
            '"system_fingerprint":"b1","object":"text_completion","usage":{"completion_tokens":3},"id":"chatcmpl-1",'
            '"extra":[1],"timings":{"x":1}}'),
        ),
        (
            events(
                text("a"), text("b", index=1), text("", index=1, finish="stop") | {"usage": 7},
                text("c"), text("", finish="length") | {"usage": 3}, "[DONE]",
            ),
            ('{"choices":[{"text":"ac","index":0,"logprobs":null,"finish_reason":"length"},'
            '{"text":"b","index":1,"logprobs":null,"finish_reason":"stop"}],"created":2,"model":"m",'
            '"system_fingerprint":"b1","object":"text_completion","usage":3,"id":"chatcmpl-1"}'),
        ),
    ],
    ids=["text", "a beginning", "nothing said", "reasoning", "tools", "tools after words", "two answers", "completion", "two completions"],
)  # fmt: skip
def test_put_together(stream, whole):
    for size in (1_000_000, 100, 1):
        assert assembled(stream, size) == (200, whole.encode())
    json.loads(whole)


def counted(chunk: dict[str, Any], count: int) -> dict[str, Any]:
    return chunk | {"timings": {"predicted_n": count}}


CUT_OFF = chat({}, finish="length")


@pytest.mark.parametrize(
    "stream",
    [
        events(BEGIN, counted(chat({"content": "a"}), 2), CUT_OFF, counted(usage(3), 3)),
        events(BEGIN, counted(chat({"reasoning_content": "a"}), 2), counted(chat({"content": ""}), 3), CUT_OFF, counted(usage(3), 3)),
        events(BEGIN, CUT_OFF, counted(usage(3), 3)),
        events(counted(text("a"), 1), counted(text("", finish="length") | {"usage": 2}, 2)),
        events(
            BEGIN, counted(chat({"content": "a"}), 1), CUT_OFF, counted(usage(1), 1),
            counted(chat({"content": "b"}, index=1), 1), chat({}, index=1, finish="length"), counted(usage(2), 2),
        ),
        events(BEGIN, counted(chat({"content": ""}), 1), chat({}, finish="stop"), counted(usage(2), 2)),
    ],
    ids=["a text", "a thought", "all of it", "a completion", "the second", "all of one that ended"],
)  # fmt: skip
def test_an_answer_that_is_cut_lacks_what_was_kept_back(stream):
    """Half a character, or the beginning of a stop word: an answer in one piece has it."""
    with pytest.raises(KeptBack) as caught:
        assembled(stream)
    assert not caught.value.ever


@pytest.mark.parametrize(
    "stream",
    [
        events(BEGIN, counted(chat({"content": "a"}), 2), counted(chat({"content": "b"}), 3), CUT_OFF, counted(usage(3), 3)),
        events(BEGIN, counted(chat({"content": "a"}), 1), chat({}, finish="stop"), counted(usage(3), 3)),
        events(counted(text("a"), 2), counted(text("", finish="length") | {"usage": 2}, 2)),
        events(BEGIN, chat({}, finish="stop"), counted(usage(1), 1)),
    ],
    ids=["to the last token", "ended", "a completion", "nothing but its end"],
)  # fmt: skip
def test_an_answer_of_which_nothing_was_kept_back(stream):
    assert assembled(stream)[0] == 200


@pytest.mark.parametrize(
    ("chunk", "ever"),
    [
        (chat({"content": "a"}, logprobs={"content": []}), False),
        (text("a", logprobs={"content": []}), False),
        (chat({"content": "a"}) | {"__verbose": {"content": ""}}, True),
    ],
)
def test_what_streams_say_otherwise(chunk, ever):
    with pytest.raises(NotWhole) as caught:
        assembled(events(BEGIN, chunk))
    assert caught.value.ever == ever


def test_an_error_is_the_answer_that_it_would_have_been():
    error = {"error": {"code": 500, "message": "Compute error.", "type": "server_error"}}
    said = json.dumps(error).encode()
    assert assembled(events(BEGIN, chat({"content": "a"}), json.dumps(error))) == (500, said)
    assert assembled(events({"error": {"code": 400, "message": "no"}}))[0] == 400
    assert assembled(events({"error": {"code": 0, "message": "no"}}))[0] == 500


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        events("[DONE]"),
        events(BEGIN, chat({"content": "a"})),
        events(BEGIN, chat({"content": "a"}), chat({}, finish="stop")),
        events(BEGIN, usage(3)),
        events(BEGIN, chat({"tool_calls": [{"index": 0}]}), chat({}, finish="stop"), usage(3)),
        events(BEGIN, chat({"tool_calls": 1}), chat({}, finish="stop"), usage(3)),
        events(BEGIN, chat({"content": 1}), chat({}, finish="stop"), usage(3)),
        events(BEGIN, call(0, "{}"), chat({}, finish="stop"), usage(3)),
        events(BEGIN, chat({}, finish="stop"), usage(3))[:-9],
        events("[1]"),
        events({"object": "x"}),
        events({"error": "none"}),
        events({"choices": [{"delta": {}}]}),
        b"data: what\n\n",
    ],
)
def test_what_makes_no_whole_answer(stream):
    with pytest.raises(NotWhole):
        assembled(stream)


def test_what_only_a_stream_can_end_with():
    """llama-server reads an answer with tools again at each token, and may find that it took it for something else."""
    lost = {"error": {"code": 500, "message": "Invalid diff: 'a' not found at start of 'b'", "type": "server_error"}}
    for assembly in (Assembly(), NativeAssembly()):
        with pytest.raises(NotWhole) as caught:
            assembled(events(lost), assembly=assembly)
        assert not caught.value.ever


def test_what_is_too_long_is_no_event():
    for assembly in (Assembly(), ResponseAssembly(b"{}"), MessageAssembly(b"{}"), NativeAssembly()):
        assembly.feed(b"x" * MAX_EVENT_BYTES)
        with pytest.raises(NotWhole, match="an event has more than"):
            assembly.feed(b"x")


RESPONSE = {
    "id": "resp_1", "object": "response", "created_at": 7, "status": "completed", "model": "m",
    "output": [{"type": "message", "status": "completed", "id": "msg_1", "content": [{"type": "output_text", "text": "a"}]}],
    "usage": {"output_tokens": 3, "input_tokens": 9},
}  # fmt: skip


def named(kind: str, **fields: Any) -> bytes:
    return f"event: response.{kind}\n".encode() + events({"type": f"response.{kind}", **fields})


@pytest.mark.parametrize("size", [1, 10, 1000])
def test_a_whole_response(size):
    stream = named("created") + named("in_progress") + named("completed", response=RESPONSE, timings={"x": 1})
    assembly = ResponseAssembly(b"{}")
    for at in range(0, len(stream), size):
        assembly.feed(stream[at : at + size])
    status, body = assembly.whole()
    assert (status, json.loads(body)) == (200, {**RESPONSE, "completed_at": 7})
    assert body.startswith(b'{"completed_at":7,"created_at":7,"id":"resp_1","model":"m","object":"response","output":[')
    assert (
        b'[{"content":[{"type":"output_text","text":"a"}],"id":"msg_1","status":"completed","type":"message"}]' in body
    )
    assert body.endswith(b',"status":"completed","usage":{"output_tokens":3,"input_tokens":9}}')


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        named("created"),
        named("completed", response={**RESPONSE, "output": [{"type": "web_search_call"}]}),
        named("completed", response={**RESPONSE, "output": 5}),
        named("completed", response=5),
        named("completed"),
        named("completed", response=RESPONSE)[:-1],
        named("completed", response=RESPONSE) + events({"error": {"code": 500}}),
    ],
)
def test_what_makes_no_whole_response(stream):
    assembly = ResponseAssembly(b"{}")
    assembly.feed(stream)
    with pytest.raises(NotWhole):
        assembly.whole()


@pytest.mark.parametrize(
    ("spoken", "bound", "whole"), [(3, 3, True), (2, 3, False), (0, 3, False), (2, 4, True), (2, None, True)]
)
@pytest.mark.parametrize(
    "by", ["max_output_tokens", "max_tokens", "max_completion_tokens", "n_predict", "flags", "context"]
)
def test_a_response_that_is_cut_lacks_what_was_kept_back(spoken, bound, whole, by):
    longest = bound if by == "flags" else None
    context = bound + 10 if by == "context" and bound else None  # there is always one token left
    body = {} if by in {"flags", "context"} else {by: bound}
    assembly = ResponseAssembly(json.dumps(body).encode(), longest, context)
    if spoken:
        assembly.feed(named("output_text.delta", delta="a", timings={"predicted_n": spoken}))
    assembly.feed(named("completed", response=RESPONSE))
    if whole:
        assert assembly.whole()[0] == 200
    else:
        with pytest.raises(KeptBack):
            assembly.whole()


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (b'{"max_tokens":3.5}', True), (b'{"max_tokens":1e999}', True), (b'{"x":' + b"[" * 900_000 + b"]" * 900_000 + b"}", True),
        (b'{"max_tokens":"3"}', False), (b'{"max_tokens":[3],"n_predict":{}}', False),
    ],
    ids=["a part of a token", "too many", "too deep", "a text", "no number"],
)  # fmt: skip
def test_odd_bounds_of_a_response(body, kept):
    assembly = ResponseAssembly(body)
    assembly.feed(
        named("output_text.delta", delta="a", timings={"predicted_n": 2}) + named("completed", response=RESPONSE)
    )
    if kept:
        with pytest.raises(KeptBack):
            assembly.whole()
    else:
        assert assembly.whole()[0] == 200


@pytest.mark.parametrize("count", [None, 1.5, "3"])
def test_odd_timings(count):
    with pytest.raises(NotWhole):
        assembled(
            events(BEGIN, counted(chat({"content": "a"}), 1), CUT_OFF, usage(3) | {"timings": {"predicted_n": count}})
        )


@pytest.mark.parametrize(("tokens", "whole"), [(1, True), (2, False)])
def test_a_response_of_which_nothing_was_said(tokens, whole):
    assembly = ResponseAssembly(b"{}")
    usage = {"output_tokens": tokens, "input_tokens": 9}
    assembly.feed(named("completed", response={**RESPONSE, "output": [], "usage": usage}))
    if whole:
        assert assembly.whole()[0] == 200
    else:
        with pytest.raises(KeptBack):
            assembly.whole()


def test_items_of_a_response_that_are_no_text():
    """In the order of the stream, not the alphabet's."""
    items = [
        {"id": "rs_1", "summary": [], "type": "reasoning", "content": [], "encrypted_content": ""},
        {
            "id": "fc_1",
            "type": "function_call",
            "status": "completed",
            "arguments": '{"b":1}',
            "call_id": "c",
            "name": "f",
        },
    ]
    assembly = ResponseAssembly(b"{}")
    assembly.feed(named("completed", response={**RESPONSE, "output": items}))
    _, body = assembly.whole()
    assert (
        b'"output":[{"id":"rs_1","summary":[],"type":"reasoning","content":[],"encrypted_content":"","status":"completed"},'
        b'{"id":"fc_1","type":"function_call","status":"completed","arguments":"{\\"b\\":1}","call_id":"c","name":"f"}]'
    ) in body


@pytest.mark.parametrize(("ended", "ever"), [(events({"error": {"code": 500}}), False), (named("created"), True)])
def test_a_response_that_ends_with_an_error_says_nothing_of_others(ended, ever):
    assembly = ResponseAssembly(b"{}")
    assembly.feed(ended)
    with pytest.raises(NotWhole) as caught:
        assembly.whole()
    assert caught.value.ever == ever


@pytest.mark.parametrize("size", [1, 50, 10_000])
async def test_progress_is_left_out_of_a_response(size):
    """What announces it is held back until it begins: until then it can be given to another llama-server."""
    begun = {"id": "resp_1", "status": "in_progress"}
    announced = named("created", response=begun)
    waits = [
        named("in_progress", response=begun, prompt_progress={"total": 9, "processed": count, "time_ms": 5})
        for count in (0, 9)
    ]
    rest = named("output_item.added", item={"content": []}) + named("completed", response=RESPONSE)
    async with linked() as (connection, peer), trio.open_nursery() as nursery:
        await connection.send(b"POST / HTTP/1.1\r\n\r\n", b"")
        data = announced + b"".join(waits) + rest
        pieces = [STREAM, *(chunk(data[at : at + size]) for at in range(0, len(data), size)), b"0\r\n\r\n"]
        nursery.start_soon(say, peer, *pieces)
        head = await connection.receive_head()
        with trio.fail_after(10):
            _, found = await Stoppable("/v1/responses", b"{}", whole=False).begin(connection, head)
            assert b"output_item.added" in found
            while piece := await connection.receive():
                found += piece
        assert found == announced + named("in_progress", response=begun) + rest


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
async def test_lines_on_progress_are_left_out_of_a_stream(size):
    said = events(progress(0), progress(5), progress(9))
    rest = events(BEGIN, chat({"content": '"prompt_progress":'}), "[DONE]")
    async with linked() as (connection, peer), trio.open_nursery() as nursery:
        await connection.send(b"POST / HTTP/1.1\r\n\r\n", b"")
        data = said + rest
        pieces = [STREAM, *(chunk(data[at : at + size]) for at in range(0, len(data), size)), b"0\r\n\r\n"]
        nursery.start_soon(say, peer, *pieces)
        head = await connection.receive_head()
        stoppable = Stoppable(CHAT, b"{}", whole=False)
        with trio.fail_after(10):
            same, found = await stoppable.begin(connection, head)
            assert same is head
            assert found.startswith(b'data: {"choices"')
            while piece := await connection.receive():
                found += piece
        assert found == rest


REPEATED = progress(0) | {"choices": chat({"content": "Once"})["choices"]}


ALL_SIZES = (1, 100, 10_000)


@pytest.mark.parametrize(
    ("path", "said", "sizes"),
    [
        (CHAT, events(BEGIN, REPEATED, progress(9), BEGIN, chat({"content": " more"})), ALL_SIZES),
        # llama-server writes what belongs together in one piece
        (CHAT, events(BEGIN, chat({"reasoning_content": "hm"}), REPEATED, progress(9), BEGIN), (10_000,)),
        (
            "/v1/responses",
            named("created") + named("in_progress") + named("output_item.added", item={"content": []})
            + named("output_text.delta", delta="Once", prompt_progress={"total": 9}),
            ALL_SIZES,
        ),
    ],
    ids=["a chat", "a chat with thoughts", "a response"],
)  # fmt: skip
async def test_a_stream_that_goes_on_with_what_was_said(path, said, sizes):
    """It is told with lines on progress, and in other pieces than without them."""
    for size in sizes:
        async with linked() as (connection, peer), trio.open_nursery() as nursery:
            await connection.send(b"POST / HTTP/1.1\r\n\r\n", b"")
            pieces = [STREAM, *(chunk(said[at : at + size]) for at in range(0, len(said), size))]
            nursery.start_soon(say, peer, *pieces)
            head = await connection.receive_head()
            with trio.fail_after(10), pytest.raises(NotWhole) as caught:
                await Stoppable(path, b"{}", whole=False).begin(connection, head)
            assert not caught.value.ever
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("path", "said", "first"),
    [
        (CHAT, [BEGIN, chat({"content": "a"}), chat({"content": "b"})], 2),
        (
            "/v1/responses",
            [named("created"), named("in_progress"), named("output_text.delta", delta="a"), named("x")],
            3,
        ),
    ],
    ids=["a chat", "a response"],
)
async def test_a_llama_server_that_says_nothing_of_progress(path, said, first):
    """What came first is held back until it is known that none comes."""
    written = [each if isinstance(each, bytes) else events(each) for each in said]
    async with linked() as (connection, peer):
        await connection.send(b"POST / HTTP/1.1\r\n\r\n", b"")
        await say(peer, STREAM, *map(chunk, written[:first]))
        with trio.fail_after(10):
            head = await connection.receive_head()
            _, found = await Stoppable(path, b"{}", whole=False).begin(connection, head)
        assert found == b"".join(written[:first])


async def test_a_stream_without_one_whole_event():
    async with linked() as (connection, peer):
        await connection.send(b"POST / HTTP/1.1\r\n\r\n", b"")
        await say(peer, STREAM, chunk(b"data: x"), b"0\r\n\r\n")
        _, found = await Stoppable(CHAT, b"{}", whole=False).begin(connection, await connection.receive_head())
        assert found == b"data: x"


async def test_one_that_breaks_off_is_a_lost_backend():
    async with linked() as (connection, peer):
        await connection.send(b"POST / HTTP/1.1\r\n\r\n", b"")
        await say(peer, STREAM, chunk(events(BEGIN)))
        await peer.send_eof()
        head: AnswerHead = await connection.receive_head()
        with pytest.raises(BackendLost):
            await Stoppable(CHAT, b"{}", whole=True).begin(connection, head)


# --- through a router -------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
async def test_a_whole_answer(sockets, way):
    said = events(progress(9), BEGIN, chat({"content": "a"}), chat({}, finish="stop"), usage(3), "[DONE]")
    server = Server(STREAM, chunk(said[:50]), 0.01, chunk(said[50:]), b"0\r\n\r\n")
    async with open_site(sockets, server, stop_at_once=True) as site:
        for _ in range(2):
            reply = await site.ask("POST", CHAT, WAYS[way], BODY)
            assert (reply.status, reply.headers["content-type"]) == (200, "application/json; charset=utf-8")
            assert int(reply.headers["content-length"]) == len(reply.body)
            assert reply.body.decode() == (
                '{"choices":[{"finish_reason":"stop","index":0,"message":{"role":"assistant","content":"a"}}],'
                + FOOT
                + "}"
            )
            assert "cache-control" not in reply.headers
        assert b'"stream":true' in server.asked[0]
        assert {event.output_tokens for event in await site.told(2)} == {3}


@pytest.mark.parametrize("way", WAYS)
async def test_a_stream(sockets, way):
    said = events(BEGIN, chat({"content": "a"}), "[DONE]")
    server = Server(STREAM, chunk(events(progress(3))), 0.01, chunk(said), b"0\r\n\r\n")
    async with open_site(sockets, server, stop_at_once=True) as site:
        reply = await site.ask("POST", CHAT, WAYS[way], b'{"model":"qwen","stream":true}')
        assert reply.body == said
        assert server.asked[0].endswith(b'"stream":true,"return_progress":true}')


class OldServer:
    """Answers a stream, asked for or not, that no whole can be made from; and in one piece when it is not asked for one."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []

    async def __call__(self, stream: trio.SocketStream) -> None:
        while asked := await read_request(stream):
            self.asked.append(asked.partition(b"\r\n\r\n")[2])
            if b'"stream":true' in asked:
                await stream.send_all(STREAM + chunk(events(BEGIN)) + b"0\r\n\r\n")
            else:
                await stream.send_all(answer(b'{"in":"one piece"}'))


@pytest.mark.parametrize("way", WAYS)
async def test_what_no_whole_can_be_made_from_is_asked_for_as_it_was(sockets, way):
    """And from then on at once."""
    server = OldServer()
    async with open_site(sockets, server, stop_at_once=True) as site:
        for count in (2, 3, 4):
            assert (await site.ask("POST", CHAT, WAYS[way], BODY)).body == b'{"in":"one piece"}'
            assert len(server.asked) == count
        assert server.asked[1:] == [BODY] * 3
        await site.ask("POST", TEXT, WAYS[way], BODY)
        assert len(server.asked) == 6, "another path is another matter"


async def test_a_backend_that_answers_in_one_piece_all_the_same(sockets):
    async with open_site(sockets, Server(), stop_at_once=True) as site:
        reply = await site.ask("POST", CHAT, [], BODY)
        assert (reply.status, reply.body) == (200, b'{"ok":true}')


class NoStreamWithTools:
    """Refuses a stream where it would answer in one piece."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []

    async def __call__(self, stream: trio.SocketStream) -> None:
        while asked := await read_request(stream):
            self.asked.append(asked.partition(b"\r\n\r\n")[2])
            refused = b'"stream":true' in asked and b'"grammar"' in asked
            if refused:
                await stream.send_all(answer(b'{"error":{"code":400}}').replace(b"200 OK", b"400 Bad Request"))
            elif b'"stream":true' in asked:
                said = events(BEGIN, call(0, "{}", id="x", name="f"), chat({}, finish="tool_calls"), usage(3))
                await stream.send_all(STREAM + chunk(said) + b"0\r\n\r\n")
            else:
                await stream.send_all(answer(b'{"in":"one piece"}'))


@pytest.mark.parametrize("way", WAYS)
async def test_what_is_refused_as_a_stream_is_asked_for_as_it_was(sockets, way):
    """And the next one as a stream again."""
    server = NoStreamWithTools()
    body = b'{"model":"qwen","tools":[],"grammar":""}'
    async with open_site(sockets, server, stop_at_once=True) as site:
        reply = await site.ask("POST", CHAT, WAYS[way], body)
        assert (reply.status, reply.body) == (200, b'{"in":"one piece"}')
        assert len(server.asked) == 2
        assert server.asked[1] == body
        reply = await site.ask("POST", CHAT, WAYS[way], b'{"model":"qwen","tools":[]}')
        assert json.loads(reply.body)["choices"][0]["finish_reason"] == "tool_calls"
        assert len(server.asked) == 3
