"""Shapes are those of llama-server b10068, as it sent them."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trio_router.telemetry.usage import HEAD_BYTES, NOTHING, Usage, usage_of

TIMINGS = (
    '"timings":{"cache_n":30,"prompt_n":1,"prompt_ms":10.34,"prompt_per_token_ms":10.34,"prompt_per_second":96.7,'
    '"predicted_n":6,"predicted_ms":50.114,"predicted_per_token_ms":8.352333333333332,"predicted_per_second":119.7}'
)
OPENAI = (
    '"usage":{"completion_tokens":6,"prompt_tokens":31,"total_tokens":37,"prompt_tokens_details":{"cached_tokens":30}}'
)
PACE = {"prompt_seconds": 0.01034, "seconds_per_output_token": pytest.approx(0.008352333)}
WHOLE = {"input_tokens": 31, "output_tokens": 6, "cached_tokens": 30}

CHAT = '{"choices":[{"finish_reason":"length","index":0,"message":{"role":"assistant","content":"Hello"}}],"created":1,'
CHUNK = (
    'data: {"choices":[{"finish_reason":"length","index":0,"delta":{}}],"created":1,"object":"chat.completion.chunk",'
)
RESPONSES = (
    '"usage":{"input_tokens":31,"output_tokens":6,"total_tokens":37,"input_tokens_details":{"cached_tokens":30}}'
)
MESSAGE_START = (
    'event: message_start\ndata: {"type":"message_start","message":{"id":"x","content":[],"usage":'
    '{"cache_read_input_tokens":30,"input_tokens":1,"output_tokens":0}}}\n\n'
)
MESSAGE_END = (
    'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"max_tokens","stop_sequence":null},'
    '"usage":{"output_tokens":6}}\n\nevent: message_stop\ndata: {"type":"message_stop"}\n\n'
)
SHAPES = {
    "chat": (f'{CHAT}{OPENAI},"id":"x",{TIMINGS}}}', WHOLE | PACE),
    "chat stream": (f"{CHUNK}{TIMINGS}}}\n\ndata: [DONE]\n\n", WHOLE | PACE),
    "chat stream with usage": (f"{CHUNK}{OPENAI},{TIMINGS}}}\n\ndata: [DONE]\n\n", WHOLE | PACE),
    "completion": (f'{{"index":0,"content":"x","prompt":"hello","tokens_cached":5,{TIMINGS}}}', WHOLE | PACE),
    "responses": (f'{{"id":"resp_x","output":[],"status":"completed",{RESPONSES}}}', WHOLE),
    "responses stream": (
        f'event: response.completed\ndata: {{"type":"response.completed","response":{{"output":[],{RESPONSES}}},{TIMINGS}}}\n\n',
        WHOLE | PACE,
    ),
    "messages": (
        '{"id":"x","stop_sequence":null,"usage":{"cache_read_input_tokens":30,"input_tokens":1,"output_tokens":6}}',
        WHOLE,
    ),
    "messages stream": (f"{MESSAGE_START}{MESSAGE_END}", WHOLE),
    "embeddings": ('{"object":"list","usage":{"prompt_tokens":31,"total_tokens":31},"data":[]}', {"input_tokens": 31}),
    "spaces": (json.dumps({"a": 1, "usage": {"prompt_tokens": 3, "completion_tokens": 4}}, indent=2),
               {"input_tokens": 3, "output_tokens": 4}),
    "without a pace": ('{"a":1,"timings":{"predicted_n":4,"predicted_ms":6}}',
                       {"output_tokens": 4, "seconds_per_output_token": 0.0015}),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_what_llama_server_says(shape: str) -> None:
    body, said = SHAPES[shape]
    assert usage_of(b"", body.encode()) == Usage(**said)
    assert usage_of(body.encode()[:HEAD_BYTES], body.encode()) == Usage(**said)


def test_a_long_anthropic_stream_says_it_in_two_places() -> None:
    assert usage_of(MESSAGE_START.encode(), b"x" * 3000 + MESSAGE_END.encode()) == Usage(**WHOLE)
    assert usage_of(b"", MESSAGE_END.encode()) == Usage(output_tokens=6)


def test_long_embeddings_say_it_at_the_beginning() -> None:
    head = b'{"model":"m","object":"list","usage":{"prompt_tokens":31,"total_tokens":31},"data":[{"embedding":[0.1,'
    assert usage_of(head, b"0.1," * 1000) == Usage(input_tokens=31)


def test_of_what_is_told_several_times_the_last_counts() -> None:
    first = '{"a":1,"timings":{"predicted_n":1,"predicted_ms":8}}'
    assert usage_of(b"", f"data: {first}\n\n{CHUNK}{TIMINGS}}}\n\n".encode()) == Usage(**(WHOLE | PACE))


@pytest.mark.parametrize(
    "said",
    [
        ',"usage":{"completion_tokens":999,"prompt_tokens":999}',
        '{"usage":{"completion_tokens":999}}',
        '\\,"usage":{"completion_tokens":999}',
        '"},"usage":{"completion_tokens":999},{"',
        ',"timings":{"predicted_n":999,"predicted_ms":1}',
    ],
)
def test_what_a_model_says_is_not_read(said: str) -> None:
    body = json.dumps({"choices": [{"text": said}], "created": 1}).encode()
    for begin in range(len(body)):  # wherever the tail begins
        assert usage_of(b"", body[begin:]) == NOTHING
    told = json.dumps({"choices": [{"text": said}], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}).encode()
    assert usage_of(told[:HEAD_BYTES], told) == Usage(input_tokens=1, output_tokens=2)


@pytest.mark.parametrize(
    "odd",
    [
        '{"usage":{"prompt_tokens":-5,"completion_tokens":"7","cached_tokens":null}}',
        '{"usage":{"prompt_tokens":1e999}}',
        '{"usage":{"prompt_tokens":99999999999999999999999}}',
        '{"usage":null,"timings":[]}',
        '{"usage":{}}',
        '{"usage":{"prompt_tokens":}}',
        '{"timings":{"predicted_n":0,"predicted_ms":0.0}}',
        '{"usage":{"prompt_tokens":5',
        '{"usage":{"a":{"b":{"prompt_tokens":5}}}}',
        "usage timings",
        "",
    ],
)
def test_odd_numbers_are_left_out(odd: str) -> None:
    usage = usage_of(b"", odd.encode())
    assert usage == NOTHING or usage == Usage(output_tokens=0)


@given(st.binary(max_size=300), st.binary(max_size=300))
@example(b"", b',"usage":{' * 400)
@example(b"", b',"usage":{"prompt_tokens":1' * 150)
@example(b"", b',"timings":{' + b"{}" * 2000)
def test_bytes_of_any_kind(head: bytes, tail: bytes) -> None:
    usage_of(head, tail)


PIECES = st.sampled_from([
    "{", "}", ",", '"usage"', '"timings"', ":", '"prompt_tokens"', '"prompt_ms"', '"predicted_n"', "1", "-", "1e300",
    "1e308", "0", ".", '"', "\\", "\n", " ", "é", "[", '"predicted_ms"', '"cached_tokens"', '"input_tokens"', "5",
])  # fmt: skip


@given(st.lists(PIECES, max_size=60))
def test_almost_json(pieces: list[str]) -> None:
    usage = usage_of(b"", "".join(pieces).encode())
    for number in (usage.input_tokens, usage.output_tokens, usage.cached_tokens):
        assert number is None or 0 <= number < 10**16


@given(st.text(), st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 500))
def test_after_any_text(text: str, prompt: int, completion: int, begin: int) -> None:
    usage = {"completion_tokens": completion, "prompt_tokens": prompt}
    body = json.dumps({"choices": [{"text": text, "usage": text}], "usage": usage}, ensure_ascii=False).encode()
    tail = body[min(begin, body.rindex(b',"usage"') if b',"usage"' in body else body.rindex(b', "usage"')) :]
    assert usage_of(b"", tail) == Usage(input_tokens=prompt, output_tokens=completion)
