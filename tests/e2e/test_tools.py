"""Whole answers that call tools, or think first: put together from streams as the real llama-server writes them itself.

A model of 135 million parameters calls a tool if all it has seen is calls of it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.ways import Ways, assert_same, open_ways

pytestmark = [pytest.mark.e2e, pytest.mark.once]

FLAGS = ["-c", "2048", "-np", "1", "-t", "1", "--jinja", "--chat-template-file"]
TOOLS_TEMPLATE = """\
{%- if tools %}<|im_start|>system
# Tools
<tools>{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
</tools>
For each call return a json object with name and arguments:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role + '\\n' }}
{%- if message.content %}{{- message.content }}{%- endif %}
{%- for tool_call in message.tool_calls or [] %}{{- '\\n<tool_call>\\n{"name": "' + tool_call.function.name }}
{{- '", "arguments": ' }}{{- tool_call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
THINKING_TEMPLATE = """\
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and message.reasoning_content %}
{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{%- endif %}
{%- if message.content %}{{- message.content }}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}
"""
PLAIN = {"model": "smollm2", "temperature": 0, "seed": 1, "cache_prompt": False}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
QUESTION = "Weather in Rome?"


@pytest.fixture(scope="module")
def tools(real_llama: Path, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ways]:
    folder = tmp_path_factory.mktemp("tools")
    template = folder / "tools.jinja"
    template.write_text(TOOLS_TEMPLATE)
    with open_ways(folder, real_llama, smollm2, [*FLAGS, str(template)]) as ways:
        yield ways


@pytest.fixture(scope="module")
def thinking(real_llama: Path, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ways]:
    folder = tmp_path_factory.mktemp("thinking")
    template = folder / "thinking.jinja"
    template.write_text(THINKING_TEMPLATE)
    with open_ways(folder, real_llama, smollm2, [*FLAGS, str(template)]) as ways:
        yield ways


def chat(calls: int, **more: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": '{"city":"Rome"}'}
    seen = [
        {"role": "user", "content": QUESTION},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "id": f"c{number}", "function": function} for number in range(calls)],
        },
        {"role": "tool", "tool_call_id": "c0", "content": "sunny"},
    ]
    tool = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
    return {"messages": [*seen, {"role": "user", "content": QUESTION}], "tools": [tool], "max_tokens": 70, **more}


def message(calls: int, **more: Any) -> dict[str, Any]:
    uses = [
        {"type": "tool_use", "id": f"c{number}", "name": "weather", "input": {"city": "Rome"}}
        for number in range(calls)
    ]
    seen = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": uses},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c0", "content": "sunny"}]},
    ]
    tool = {"name": "weather", "input_schema": PARAMETERS}
    return {"messages": [*seen, {"role": "user", "content": QUESTION}], "tools": [tool], "max_tokens": 70, **more}


def response(calls: int, **more: Any) -> dict[str, Any]:
    seen = [
        {"role": "user", "content": QUESTION},
        *(
            {"type": "function_call", "call_id": f"c{number}", "name": "weather", "arguments": '{"city":"Rome"}'}
            for number in range(calls)
        ),
        {"type": "function_call_output", "call_id": "c0", "output": "sunny"},
    ]
    tool = {"type": "function", "name": "weather", "parameters": PARAMETERS}
    asked = [*seen, {"role": "user", "content": QUESTION}]
    return {"input": asked, "tools": [tool], "max_output_tokens": 70, **more}


CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        (CHAT, chat(1), b'"tool_calls":['),
        (CHAT, chat(2, parallel_tool_calls=True), b'},{"type":"function","function":{"name":"weather"'),
        (CHAT, chat(1, tool_choice="required", max_tokens=14), b'"finish_reason":"length"'),
        (CHAT, chat(1, tool_choice="none", max_tokens=5), b'"content":"'),
        (CHAT, chat(1, logprobs=True, max_tokens=4), b'"logprobs":{"content":['),
        (CHAT, chat(1, tool_choice="what"), b'"error":'),
        (MESSAGES, message(1), b'"stop_reason":"tool_use"'),
        (MESSAGES, message(2), b'},{"type":"tool_use","id":'),
        (MESSAGES, message(1, max_tokens=14), b'"name":"weather","input":{}}'),
        (RESPONSES, response(1), b'"type":"function_call","status":"completed"'),
        (RESPONSES, response(2, parallel_tool_calls=True), b'"name":"weather"},{"id":'),
        (RESPONSES, response(1, max_output_tokens=14), b'"arguments":"{"'),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_tools(tools: Ways, path: str, body: dict[str, Any], expected: bytes) -> None:
    answers = tools.ask(path, PLAIN | body, passing=False, twice=path == MESSAGES)
    assert expected in answers[0].content
    assert_same(answers)


GRAMMAR = {"grammar": 'root ::= "h" "m\\n</think>\\n\\n" "ok " "fine"'}


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 30} | GRAMMAR, b'"reasoning_content":"hm'),
        (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2} | GRAMMAR, b'"content":""'),
        (MESSAGES, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}, b'"type":"thinking"'),
        (RESPONSES, {"input": "Hi", "max_output_tokens": 30} | GRAMMAR, b'"type":"reasoning"'),
        (RESPONSES, {"input": "Hi", "max_output_tokens": 2} | GRAMMAR, b'"type":"reasoning"'),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_thinking(thinking: Ways, path: str, body: dict[str, Any], expected: bytes) -> None:
    answers = thinking.ask(path, PLAIN | body, passing=False, twice=path == MESSAGES)
    assert expected in answers[0].content
    assert_same(answers)


def test_none_of_them_was_asked_for_twice(tools: Ways, thinking: Ways) -> None:
    """Nothing of that was given up, and sent as it came from then on."""
    for ways in (tools, thinking):
        assert "cannot be stopped at once" not in ways.log()
