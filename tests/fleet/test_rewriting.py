"""What a policy does to a body; everything else stays as it was written."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_router.config.policies import ModelPolicy, Policy, overlaid
from trio_router.errors import InvalidJSON
from trio_router.fleet.rewriting import AS_IT_IS, LENGTHS, Rewriting

CHAT = "/v1/chat/completions"


def rewritten(body: Any, path: str = CHAT, **policy: Any) -> Any:
    rewriting = Rewriting.of(Policy(**policy))
    assert rewriting is not None
    return json.loads(rewriting.apply(path, json.dumps(body).encode()))


def test_nothing_to_do() -> None:
    assert Rewriting.of(Policy()) is None
    assert Rewriting.of(ModelPolicy(name="a", description="b", aliases=("c",), variants={"v": Policy()})) is None


def test_set_default_strip() -> None:
    body = {"model": "m", "temperature": 2, "logit_bias": {"1": 2}, "top_p": None}
    assert rewritten(
        body,
        set={"temperature": 0.5, "seed": 1},
        default={"top_p": 0.9, "seed": 7, "stop": ["x"]},
        strip=("logit_bias",),
    ) == {"model": "m", "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["x"]}


def test_a_default_in_the_place_of_what_was_stripped() -> None:
    assert rewritten({"a": 1, "b": 1}, strip=("a",), default={"a": 2, "b": 2}) == {"a": 2, "b": 1}


@pytest.mark.parametrize(
    ("there", "policy", "then"),
    [
        ({"t": {"a": 1, "b": 1}}, {"set": {"t": {"a": 2}}}, {"t": {"a": 2, "b": 1}}),
        ({"t": {"a": 1}}, {"default": {"t": {"a": 2, "b": 2}}}, {"t": {"a": 1, "b": 2}}),
        ({}, {"set": {"t": {"a": {"b": 1}}}}, {"t": {"a": {"b": 1}}}),
        ({"t": None}, {"default": {"t": {"a": 1}}}, {"t": {"a": 1}}),
        ({"t": 5}, {"default": {"t": {"a": 1}}}, {"t": 5}),
        ({"t": 5}, {"set": {"t": {"a": 1}}}, {"t": {"a": 1}}),
        ({"t": {"a": 1, "b": {"c": 1, "d": 1}}}, {"strip": ("t.b.c", "t.a")}, {"t": {"b": {"d": 1}}}),
        ({"t": [1]}, {"strip": ("t.b", "u.v")}, {"t": [1]}),
        ({"t": {"a": 1}}, {"set": {"t": 3}}, {"t": 3}),
    ],
)
def test_tables(there: Any, policy: Any, then: Any) -> None:
    assert rewritten(there, **policy) == then


def test_what_is_not_concerned_keeps_its_digits() -> None:
    body = b'{ "model" : "m",\n "x": 1.50, "big": 123456789012345678901234567890, "e": [1E2, {"a" : "\\u00e4"}] }'
    rewriting = Rewriting.of(Policy(set={"t": 1}))
    assert rewriting is not None
    assert rewriting.apply(CHAT, body) == (
        b'{"model":"m","x":1.50,"big":123456789012345678901234567890,"e":[1E2, {"a" : "\\u00e4"}],"t":1}'
    )
    assert AS_IT_IS.apply(CHAT, bytearray(b'{"keep_alive": 5, "x": 1.0}')) == b'{"x":1.0}'


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"3", b'{"a":}', b'"a"'])
def test_no_object(body: bytes) -> None:
    with pytest.raises(InvalidJSON):
        AS_IT_IS.apply(CHAT, body)


@pytest.mark.parametrize(
    ("asked", "then"),
    [
        ({}, {"max_tokens": 100}),
        ({"max_tokens": 50}, {"max_tokens": 50}),
        ({"max_tokens": 500}, {"max_tokens": 100}),
        ({"max_tokens": None}, {"max_tokens": 100}),
        ({"max_tokens": -1}, {"max_tokens": 100}),
        ({"max_tokens": "many"}, {"max_tokens": 100}),
        ({"max_tokens": True}, {"max_tokens": 100}),
        ({"max_tokens": 1e9}, {"max_tokens": 100}),
        ({"max_completion_tokens": 20}, {"max_completion_tokens": 20, "max_tokens": 20}),
        ({"n_predict": -1, "max_tokens": 7}, {"n_predict": 100, "max_tokens": 7}),
        ({"n_predict": 5000}, {"n_predict": 100, "max_tokens": 100}),
        ({"max_tokens": 0}, {"max_tokens": 0}),
    ],
)
def test_the_longest_answer(asked: Any, then: Any) -> None:
    assert rewritten(asked, max_output_tokens=100) == then


@pytest.mark.parametrize("number", [b"1e400", b"-1e400", b"9" * 400, b"-" + b"9" * 400])
def test_a_number_beyond_all_others_is_no_bound(number: bytes) -> None:
    rewriting = Rewriting.of(Policy(max_output_tokens=100))
    assert rewriting is not None
    assert json.loads(rewriting.apply(CHAT, b'{"max_tokens":%b}' % number))["max_tokens"] == 100


def test_each_endpoint_names_it_its_own_way() -> None:
    for path, name in LENGTHS.items():
        assert rewritten({}, path, max_output_tokens=9) == {name: 9}
    assert rewritten({}, "/v1/embeddings", max_output_tokens=9) == {}


def test_a_variant_is_laid_over_its_model() -> None:
    below = ModelPolicy(
        name="n", set={"a": 1, "t": {"x": 1, "y": 1}}, default={"b": 1}, strip=("s",), max_output_tokens=9
    )
    above = Policy(set={"t": {"y": 2}}, default={"c": 1}, strip=("s", "u"))
    assert overlaid(below, above) == Policy(
        set={"a": 1, "t": {"x": 1, "y": 2}}, default={"b": 1, "c": 1}, strip=("s", "u"), max_output_tokens=9
    )
    assert overlaid(below, Policy(name="v", max_output_tokens=99)).max_output_tokens == 99
    assert overlaid(below, Policy(name="v")).name == "v"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.sampled_from("abcde") | st.text(max_size=3), JSON, max_size=5)


@given(body=OBJECTS, over=st.dictionaries(st.sampled_from("abc"), st.integers(0, 9) | st.text(max_size=3), max_size=3))
def test_set_has_the_last_word_and_touches_nothing_else(body: dict[str, Any], over: dict[str, Any]) -> None:
    rewriting = Rewriting.of(Policy(set={**over, "z": 1}))
    assert rewriting is not None
    body.pop("keep_alive", None)
    assert json.loads(rewriting.apply(CHAT, json.dumps(body).encode())) == {**body, **over, "z": 1}
