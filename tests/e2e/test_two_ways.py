"""The real llama-server bare, and through both ways in: the same bytes but for the time of day and the clock."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.ways import Ways, assert_same, open_ways

pytestmark = pytest.mark.e2e

FLAGS = ["-c", "2048", "-np", "1", "-t", "1"]


@pytest.fixture(scope="module")
def ways(real_llama: Path, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ways]:
    with open_ways(tmp_path_factory.mktemp("ways"), real_llama, smollm2, FLAGS) as ways:
        yield ways


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.reasoning_content %}<think>\n"
    "{{ message.reasoning_content }}\n</think>\n\n{% endif %}{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Of a model that thinks: what may become the beginning of a thought is not said before it is known."""


@pytest.fixture(scope="module")
def thinking(real_llama: Path, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ways]:
    folder = tmp_path_factory.mktemp("thinking")
    (folder / "template.jinja").write_text(TEMPLATE)
    flags = ["-c", "256", "-np", "2", "-t", "1", "--jinja", "--chat-template-file", str(folder / "template.jinja")]
    with open_ways(folder, real_llama, smollm2, flags) as ways:
        yield ways


PLAIN = {"model": "smollm2", "temperature": 0, "seed": 1, "cache_prompt": False}
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]
MESSAGES = [{"role": "user", "content": "Name three colours."}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 12}),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 12, "stream": True}),
        (
            "/v1/chat/completions",
            {"messages": MESSAGES, "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}},
        ),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 3, "logprobs": True, "top_logprobs": 2}),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 30, "stop": ["e", "\n"], "stream": False}),
        ("/v1/chat/completions", {"messages": MESSAGES, "grammar": r'root ::= "😀 \"ö\\" <b>\n"'}),
        ("/v1/chat/completions", {"messages": MESSAGES, "grammar": 'root ::= ""'}),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, "stream_options": {"include_usage": False}}),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, "n": 2}),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, "tools": TOOLS}),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, "tools": TOOLS, "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 5000}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 5000}], "stream": True}),
        ("/v1/completions", {"prompt": ["Once", "Twice"], "max_tokens": 3, "logprobs": 1}),
        ("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 3, "stream": True}),
        ("/v1/completions", {"prompt": "Once", "max_tokens": 3, "n": 2, "stream": True}),
        ("/v1/completions", {"prompt": "Once upon a time", "max_tokens": 8}),
        ("/v1/completions", {"prompt": "Once upon a time", "max_tokens": 8, "stream": True, "logprobs": 2}),
        ("/v1/responses", {"input": "Name three colours.", "max_output_tokens": 6}),
        ("/v1/responses", {"input": "Name three colours.", "max_output_tokens": 6, "stream": True}),
        ("/v1/responses", {"input": MESSAGES, "max_output_tokens": 6, "instructions": "Be brief."}),
        ("/v1/responses", {"input": "word " * 5000}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 6}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 6, "stream": True}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 30, "stop_sequences": ["e", "\n"], "stream": False}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 3, "system": "Be brief.", "tools": []}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "word " * 5000}], "max_tokens": 3}),
        ("/completion", {"prompt": "Once", "n_predict": 3, "n_probs": 2, "stream": True}),
        ("/completion", {"prompt": "Once", "n_predict": 3, "n_probs": 2}),
        ("/completion", {"prompt": "Once", "n_predict": 9, "stop": ["the"], "stream": False}),
        ("/completion", {"prompt": "Once", "n_predict": 3, "return_tokens": True}),
        ("/completion", {"prompt": ["Once", "Twice"], "n_predict": 3}),
        ("/completion", {"prompt": "Once", "n_predict": 3, "n_cmpl": 2}),
        ("/completions", {"prompt": "Once", "n_predict": 3}),
        ("/completion", {"prompt": "word " * 5000}),
        ("/infill", {"input_prefix": "def f(", "input_suffix": "):", "n_predict": 3}),
        (
            "/completion",
            {"prompt": "Once", "n_predict": 2, "response_fields": ["content", "generation_settings/top_k"]},
        ),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 9, "response_format": {"type": "json_object"}}),
        ("/v1/chat/completions", {"messages": MESSAGES, "grammar": "root ::= (", "stream": True}),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 3}),
        ("/v1/messages/count_tokens", {"messages": MESSAGES}),
        ("/tokenize", {"content": "Hello, wörld", "with_pieces": True}),
        ("/detokenize", {"tokens": [1, 2, 3]}),
        ("/apply-template", {"messages": MESSAGES}),
        *(
            (
                "/v1/chat/completions",
                {"messages": [*MESSAGES, {"role": "assistant", "content": "Red, "}], "max_tokens": 4, **more},
            )
            for more in ({"stream": True}, {}, {"continue_final_message": True, "add_generation_prompt": False})
        ),
        *(
            (path, {**body, **more, "grammar": 'root ::= "ok"'})
            for path, body, more in (
                ("/v1/chat/completions", {"messages": MESSAGES}, {"logprobs": True}),
                ("/v1/chat/completions", {"messages": MESSAGES}, {"verbose": True}),
                ("/v1/completions", {"prompt": "Once"}, {"logprobs": 1}),
                ("/completion", {"prompt": "Once"}, {"n_probs": 1, "stop": ["k"]}),
            )
        ),
        *(
            (path, {**body, length: count, "stop": ["\n\n", "</a>"], "grammar": f'root ::= "{said}"'})
            for said, counts in (("a\\nb </ab>", (5,)), ("\U0001f600", (1, 2)))
            for count in counts
            for path, body, length in (
                ("/v1/chat/completions", {"messages": MESSAGES}, "max_tokens"),
                ("/v1/completions", {"prompt": "Once"}, "max_tokens"),
                ("/completion", {"prompt": "Once"}, "n_predict"),
                ("/v1/responses", {"input": "Hi"}, "max_output_tokens"),
            )
        ),
        ("/v1/chat/completions", {"messages": "no list"}),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}),
        ("/v1/completions", {}),
        ("/v1/embeddings", {"input": "not with this model"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "stream" if value.get("stream") else "plain",
)
def test_the_same_bytes(ways: Ways, path: str, body: dict[str, Any]) -> None:
    assert_same(ways.ask(path, PLAIN | body))


@pytest.mark.parametrize("fields", [{}, {"response_format": "text"}, {"stream": "true"}])
@pytest.mark.parametrize("files", [{"file": ("a.wav", b"RIFF", "audio/wav")}, {"other": b"x"}])
def test_a_form_comes_to_be_read(ways: Ways, fields: dict[str, str], files: dict[str, Any]) -> None:
    """This model hears nothing, and says so."""
    answers = ways.ask("/v1/audio/transcriptions", data={"model": "smollm2", **fields}, files=files)
    assert_same(answers)
    assert answers[0].status_code in {400, 500, 501}
    assert "audio" in answers[0].text or "file" in answers[0].text or "response_format" in answers[0].text


SAID = ("<think>", "<", "  ", "", "<think>ab", "hello 🎉🎉")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        *(
            (path, {**body, "grammar": f'root ::= "{said}"'})
            for said in SAID
            for path, body in (
                ("/v1/chat/completions", {"messages": MESSAGES}),
                ("/v1/responses", {"input": "Hi"}),
                ("/v1/messages", {"messages": MESSAGES, "max_tokens": 20}),
                ("/v1/messages", {"messages": MESSAGES, "max_tokens": 1}),
            )
        ),
        *(
            ("/v1/responses", {"input": "Hi", "grammar": 'root ::= "hello 🎉🎉"', bound: count})
            for bound in ("max_output_tokens", "max_tokens", "n_predict")
            for count in (2, 3)
        ),
        ("/v1/responses", {"input": "Hi", "grammar": 'root ::= "a stop"', "max_tokens": 2, "stop": ["a stop!"]}),
        ("/v1/responses", {"input": "Hi", "n": 2, "max_output_tokens": 3}),
        ("/v1/responses", {"input": "Hi", "ignore_eos": True}),  # to the end of the context
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 3, "stream": True, "timings_per_token": True}),
        ("/completion", {"prompt": "Hi", "n_predict": 3, "reasoning_format": "deepseek-legacy"}),
    ],
    ids=lambda value: value if isinstance(value, str) else value.get("grammar", "plain"),
)
def test_of_a_model_that_thinks(thinking: Ways, path: str, body: dict[str, Any]) -> None:
    answers = thinking.ask(path, PLAIN | body)
    cached = re.compile(rb'"(?:cached_tokens|cache_read_input_tokens|input_tokens)":\d+')  # some are asked for twice
    for answer in answers:
        answer._content = cached.sub(b"#", answer.content)
        answer.headers["content-length"] = str(len(answer.content))
    assert_same(answers)
