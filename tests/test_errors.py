import inspect
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_router import errors
from trio_router.errors import (
    MAX_ECHO,
    HeadRefused,
    MethodNotAllowed,
    RouterError,
    ServiceUnavailable,
    TooManyRequests,
    shown,
)

ALL = [found for _, found in inspect.getmembers(errors, inspect.isclass) if issubclass(found, RouterError)]

CONTRACT = {
    ("invalid_request_error", 400): {"invalid_json", "missing_model", "invalid_priority", "invalid_request"},
    ("authentication_error", 401): {"invalid_api_key"},
    ("permission_error", 403): {"host_not_allowed", "origin_not_allowed"},
    ("not_found_error", 404): {"model_not_found", "not_found"},
    ("invalid_request_error", 405): {"method_not_allowed"},
    ("timeout_error", 408): {"request_timeout"},
    ("invalid_request_error", 413): {"body_too_large"},
    ("invalid_request_error", 415): {"unsupported_media_type"},
    ("server_error", 500): {"internal_error"},
    ("server_error", 502): {"bad_backend_response", "backend_crashed"},
    ("service_unavailable_error", 503): {"queue_full", "model_failed", "shutting_down", "backend_unavailable"},
    ("insufficient_vram_error", 503): {"vram_exhausted"},
    ("timeout_error", 504): {"queue_timeout", "load_timeout", "backend_timeout"},
}


@pytest.mark.parametrize(
    ("row", "codes"), [pytest.param(*item, id=f"{item[0][1]}-{item[0][0]}") for item in CONTRACT.items()]
)
def test_every_row_of_the_contract_has_its_errors(row, codes):
    kind, status = row
    assert codes <= {error.code for error in ALL if (error.type, error.status) == (kind, status)}


@pytest.mark.parametrize("kind", ALL)
def test_the_body_is_openais(kind):
    error = kind("what happened")
    body = error.body()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"] == {"message": "what happened", "type": kind.type, "param": None, "code": kind.code}
    assert str(error) == "what happened"
    assert 400 <= kind.status < 600


@pytest.mark.parametrize("kind", ALL)
def test_retry_after_is_on_every_503_and_on_nothing_else(kind):
    assert ("Retry-After" in dict(kind("x").headers)) == (kind.status in {429, 503})


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind not in {HeadRefused, MethodNotAllowed}])
def test_details_stand_beside_the_four_and_a_wait_can_be_named(kind):
    error = kind("x", param="model", details={"model": "qwen", "queued": 3}, retry_after_seconds=60)
    assert error.body()["error"] == {
        "message": "x", "type": kind.type, "param": "model", "code": kind.code, "model": "qwen", "queued": 3
    }  # fmt: skip
    if kind.status == 503:
        assert ("Retry-After", "60") in error.headers


@pytest.mark.parametrize("kind", [ServiceUnavailable, TooManyRequests])
def test_clients_are_not_told_to_wait_longer_than_they_would(kind):
    assert dict(kind("x", retry_after_seconds=1000).headers)["Retry-After"] == "120"


def test_clients_are_told_not_to_repeat_what_stays_as_it_is():
    permanent = {kind.code for kind in ALL if dict(kind("x").headers).get("x-should-retry") == "false"}
    assert permanent == {
        *("model_failed", "vram_exhausted", "backend_crashed", "request_cancelled"),
        *("deadline_unreachable", "deadline_exceeded"),
    }


def test_details_are_the_errors_own():
    given_details = {"a": 1}
    error = RouterError("x", details=given_details)
    given_details["a"] = 2
    assert error.details == {"a": 1}


def test_a_wrong_method_names_the_right_ones():
    assert MethodNotAllowed("x", allowed=("GET", "POST")).headers == [("Allow", "GET, POST")]
    assert MethodNotAllowed("x").headers == []


@pytest.mark.parametrize("kind", ALL)
def test_one_error_told_to_many_is_as_many_errors(kind):
    one = kind("same")
    try:
        raise one
    except RouterError:
        pass
    other = one.again()
    assert other is not one
    assert type(other) is kind
    assert other.__traceback__ is None
    assert one.__traceback__ is not None
    assert (other.body(), other.headers, str(other)) == (one.body(), one.headers, str(one))


@given(st.text(max_size=400))
def test_what_a_client_sent_is_shown_harmless_and_short(text):
    said = shown(text)
    assert said.isprintable()
    assert len(said) <= 10 * (MAX_ECHO + 1) + 2
    json.dumps({"message": said}, ensure_ascii=False).encode()


@pytest.mark.parametrize("text", ["\ud800", "a\nb", "\x00", "\x1b[31m", "\u202e", "x" * 10_000])
def test_shown_for_what_would_hurt(text):
    said = shown(text)
    assert said.isprintable()
    assert len(said) <= MAX_ECHO + 20
    said.encode()
