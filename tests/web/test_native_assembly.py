"""llama-server's own completions put together; that the real one writes the same is shown in `tests/e2e`."""

import json
from typing import Any

import pytest

from trio_router.web.assembly import KeptBack, NotWhole
from trio_router.web.native_assembly import NativeAssembly

SETTINGS = {
    "seed": 1, "stop": ['"stream":true'], "stream": True, "reasoning_in_content": True, "timings_per_token": False,
}  # fmt: skip


def stream(*found: Any) -> bytes:
    return b"".join(
        b"data: %b\n\n" % json.dumps(each, separators=(",", ":"), ensure_ascii=False).encode() for each in found
    )


def piece(text: str, **more: Any) -> dict[str, Any]:
    return {"index": 0, "content": text, "tokens": [7], "stop": False, "id_slot": -1, **more}


LAST = {
    "index": 0, "content": "", "tokens": [], "id_slot": 1, "stop": True, "generation_settings": SETTINGS, "timings": {"x": 1.50},
}  # fmt: skip
PROGRESS = piece("", prompt_progress={"total": 9, "processed": 3})


def assembled(data: bytes, size: int = 1_000_000) -> tuple[int, bytes]:
    assembly = NativeAssembly()
    for at in range(0, len(data), size):
        assembly.feed(data[at : at + size])
    return assembly.whole()


@pytest.mark.parametrize("size", [1, 100, 1_000_000])
def test_put_together(size):
    whole = (
        '{"index":0,"content":"G\\"rüße","tokens":[],"id_slot":1,"stop":true,"generation_settings":{"seed":1,'
        '"stop":["\\"stream\\":true"],"stream":false,"reasoning_in_content":false,'
        '"timings_per_token":false},"timings":{"x":1.5}}'
    )
    assert assembled(stream(PROGRESS, piece('G"rü'), piece("ße"), LAST), size) == (200, whole.encode())


def test_probabilities_are_of_other_tokens_in_a_stream():
    with pytest.raises(NotWhole) as caught:
        assembled(stream(piece("a", completion_probabilities=[{"token": "a", "logprob": -1.5}])))
    assert not caught.value.ever


@pytest.mark.parametrize(
    ("said", "why", "whole"),
    [
        ([piece("a", tokens_predicted=1), piece("b", tokens_predicted=2)], "limit", True),
        ([piece("a", tokens_predicted=1), piece("", tokens_predicted=2)], "limit", False),
        ([piece("a", tokens_predicted=1)], "limit", False),
        ([piece("a", tokens_predicted=1), piece("", tokens_predicted=2)], "eos", True),
        ([piece("a", tokens_predicted=1)], "word", True),
    ],
)
def test_an_answer_that_is_cut_lacks_what_was_kept_back(said, why, whole):
    data = stream(*said, {**LAST, "tokens_predicted": 2, "stop_type": why})
    if whole:
        assert assembled(data)[0] == 200
    else:
        with pytest.raises(KeptBack):
            assembled(data)


def test_an_error_is_the_answer_that_it_would_have_been():
    error = {"error": {"code": 500, "message": "Compute error.", "type": "server_error"}}
    assert assembled(stream(piece("a"), error)) == (500, stream(error).strip().removeprefix(b"data: "))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"data: [DONE]\n\n",
        stream(piece("a")),
        stream(LAST, LAST),
        stream(LAST)[:-1],
        stream({"content": "a"}),
        stream({"content": 1, "stop": True}),
        stream([1]),
        stream({"error": "none"}),
    ],
)
def test_what_makes_no_whole_answer(data):
    with pytest.raises(NotWhole):
        assembled(data)
