"""Messages put together from their streams; that the real llama-server writes the same is shown in `tests/e2e`."""

import json
from typing import Any

import pytest

from trio_router.web.assembly import KeptBack, NotWhole
from trio_router.web.message_assembly import MessageAssembly

START = {
    "id": "chatcmpl-1", "type": "message", "role": "assistant", "content": [], "model": "m", "stop_reason": None,
    "stop_sequence": None, "usage": {"cache_read_input_tokens": 2, "input_tokens": 5, "output_tokens": 0},
}  # fmt: skip
BEGIN = ("message_start", {"message": START})


def stream(*found: tuple[str, dict[str, Any]]) -> bytes:
    return "".join(
        f"event: {kind}\ndata: {json.dumps({'type': kind} | more, separators=(',', ':'), ensure_ascii=False)}\n\n"
        for kind, more in found
    ).encode()


def block(index: int, first: dict[str, Any], *pieces: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        ("content_block_start", {"index": index, "content_block": first}),
        *(("content_block_delta", {"index": index, "delta": piece}) for piece in pieces),
    ]


def end(reason: str, sequence: str | None = None) -> list[tuple[str, dict[str, Any]]]:
    delta = {"stop_reason": reason, "stop_sequence": sequence}
    return [("message_delta", {"delta": delta, "usage": {"output_tokens": 3}}), ("message_stop", {})]


def use(arguments: str, *, index: int = 0) -> list[tuple[str, dict[str, Any]]]:
    half = len(arguments) // 2
    pieces = [{"type": "input_json_delta", "partial_json": part} for part in (arguments[:half], arguments[half:])]
    return block(index, {"type": "tool_use", "id": "x", "name": "f"}, *pieces)


def assembled(data: bytes, size: int = 1_000_000) -> bytes:
    assembly = MessageAssembly(b"{}")
    for at in range(0, len(data), size):
        assembly.feed(data[at : at + size])
    status, body = assembly.whole()
    assert status == 200
    return body


def whole(content: str, reason: str, sequence: str = "null") -> bytes:
    return (
        f'{{"id":"chatcmpl-1","type":"message","role":"assistant","content":[{content}],"model":"m","stop_reason":"{reason}",'
        f'"stop_sequence":{sequence},"usage":{{"cache_read_input_tokens":2,"input_tokens":5,"output_tokens":3}}}}'
    ).encode()


@pytest.mark.parametrize("size", [1, 100, 1_000_000])
def test_put_together(size):
    text = block(
        1, {"type": "text", "text": ""}, {"type": "text_delta", "text": 'G"rü'}, {"type": "text_delta", "text": "ße"}
    )
    thinking = block(
        0, {"type": "thinking", "thinking": ""}, {"type": "thinking_delta", "thinking": "h"},
        {"type": "thinking_delta", "thinking": "m"}, {"type": "signature_delta", "signature": ""},
    )  # fmt: skip
    assert assembled(stream(BEGIN, *thinking, ("ping", {}), *text, *end("end_turn", "x")), size) == whole(
        '{"type":"thinking","thinking":"hm","signature":""},{"type":"text","text":"G\\"rüße"}', "end_turn", '"x"'
    )


@pytest.mark.parametrize(
    ("reason", "tokens", "kept"),
    [
        ("max_tokens", 3, True),
        ("max_tokens", 1, True),
        ("end_turn", 2, True),
        ("end_turn", 1, False),
        ("end_turn", 0, False),
    ],
)
def test_of_which_nothing_was_said(reason, tokens, kept):
    """All of it may have been the beginning of a thought, or of a call of a tool; or it was the end, and nothing else."""
    delta = {"stop_reason": reason, "stop_sequence": None}
    data = stream(BEGIN, ("message_delta", {"delta": delta, "usage": {"output_tokens": tokens}}), ("message_stop", {}))
    if kept:
        with pytest.raises(KeptBack):
            assembled(data)
    else:
        assert b'"content":[]' in assembled(data)


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ('{"city": "Rome", "n": [1, -2.50, 1e3, true, null]}', '{"city":"Rome","n":[1,-2.5,1000.0,true,null]}'),
        ('{"a": "\\u00d6\\u001f\\/\\ud83d\\ude00"}', '{"a":"Ö\\u001f/😀"}'),
        ('{"b": 1, "a": 2, "b": 3}', '{"b":3,"a":2}'),
        ("{", "{}"),
        ("", "{}"),
        ('{"a": NaN}', "{}"),
        ('{"a": "\\ud800"}', "{}"),
        ("[" * 100_000, "{}"),
    ],
    ids=["blanks", "escapes", "twice", "cut off", "none", "no number", "half a pair", "deep"],
)
def test_what_a_tool_is_called_with_is_written_as_llama_server_writes_json(arguments, written):
    body = assembled(stream(BEGIN, *use(arguments), *end("tool_use")))
    assert body == whole(f'{{"type":"tool_use","id":"x","name":"f","input":{written}}}', "tool_use")


@pytest.mark.parametrize(
    ("data", "ever"),
    [
        (b"", True),
        (stream(BEGIN), True),
        (stream(*end("end_turn")), False),  # the first token was half a character
        (stream(BEGIN, ("error", {"error": {"code": 500}})), False),
        (stream(BEGIN, *use('{"a": 1e300}'), *end("tool_use")), False),  # Python has another way to write it
        (stream(BEGIN, *use('{"a": 99999999999999999999}'), *end("tool_use")), False),
        (stream(BEGIN, *block(0, {"type": "image"}), *end("tool_use")), True),
        (stream(BEGIN, *block(0, {"type": "text", "text": ""}, {"type": "odd"}), *end("end_turn")), True),
        (stream(BEGIN, *block(0, {"type": "text", "text": ""}, {"type": "text_delta", "text": 1}), *end("end_turn")), True),
        (stream(BEGIN, ("message_delta", {"delta": {}, "usage": {}})), True),
        (stream(("message_start", {"message": 5})), True),
        (stream(("content_block_delta", {"index": 0, "delta": {}})), True),
        (b"event: message_start\ndata: what\n\n", True),
    ],
)  # fmt: skip
def test_what_makes_no_whole_answer(data, ever):
    with pytest.raises(NotWhole) as caught:
        assembled(data)
    assert caught.value.ever == ever
