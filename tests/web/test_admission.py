import json
import re
from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_router.config.schema import ApiConfig
from trio_router.errors import (
    HostNotAllowed,
    InvalidApiKey,
    InvalidJSON,
    InvalidPriority,
    MissingModel,
    OriginNotAllowed,
    UnsupportedMediaType,
)
from trio_router.fleet.scheduler import Priority
from trio_router.web.admission import (
    INFERENCE_PATHS,
    OPEN_PATHS,
    Admission,
    check_encoding,
    priority,
    read_wish,
    request_id,
)

# --- read_wish --------------------------------------------------------------------------------------

json_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | json_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(json_text | st.sampled_from(["model", "stream"]), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip
objects = st.dictionaries(json_text | st.sampled_from(["model", "stream", "messages"]), values, max_size=6)
blanks = st.sampled_from([" ", "\n", "\t", "\r\n", "", "    "])


@given(objects, json_text, st.one_of(st.none(), values), st.booleans(), blanks)
def test_it_finds_what_json_loads_finds(rest, model, stream, escaped, blank):
    rest = {**rest, "model": model, "stream": stream}
    text = json.dumps(rest, ensure_ascii=escaped, indent=blank or None)
    wish = read_wish((blank + text + blank).encode())
    found = json.loads(text)
    assert wish.model == found["model"]
    assert wish.stream is (found["stream"] is True)


@given(objects)
def test_any_object_is_understood_or_refused_for_its_model(body):
    raw = json.dumps(body).encode()
    if isinstance(body.get("model"), str):
        assert read_wish(raw).model == body["model"]
        assert read_wish(bytearray(raw)).model == body["model"]
    else:
        with pytest.raises(MissingModel):
            read_wish(raw)


@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,model truefalsn0\\u', max_size=60).map(str.encode))
def test_bytes_of_any_kind_are_a_wish_or_refused(raw):
    try:
        wish = read_wish(raw)
    except (InvalidJSON, MissingModel):
        return
    assert json.loads(raw)["model"] == wish.model


@pytest.mark.parametrize(
    ("raw", "model", "stream"),
    [
        (b'{"model":"a"}', "a", False),
        (b'{"model":"a","stream":true}', "a", True),
        (b'{"model":"a","stream": \t true }', "a", True),
        (b'{"model":"a","stream":false}', "a", False),
        (b'{"model":"a","stream":null}', "a", False),
        (b'{"model":"a","stream":1}', "a", False),
        (b'{"model":"a","stream":"true"}', "a", False),
        (b'{"model":"a","stream":[true]}', "a", False),
        (b'{"messages":[{"model":"nested","stream":true}],"model":"a"}', "a", False),
        (b'{"x":{"model":"nested"},"model":"a"}', "a", False),
        (b'{"x":"\\"model\\":\\"fake\\"","model":"a"}', "a", False),
        (b'{"model":"first","model":"last","stream":true,"stream":false}', "last", False),
        (b'{"model":1,"model":"last"}', "last", False),
        (b'{"mod\\u0065l":"escaped"}', "escaped", False),
        (b'{"Model":"x","MODEL":"y","model":"a"}', "a", False),
        (b'\r\n\t {"model"\n:\t"a"} \n', "a", False),
        ('{"model":"ü/λ"}'.encode(), "ü/λ", False),
        (b'{"model":"\\ud83d\\ude00"}', "\U0001f600", False),
        (b'{"model":""}', "", False),
        (b'{"model":"a\\u0000b"}', "a\0b", False),
        (b'{"model":"a","x":1e999,"y":-0.0,"z":123456789012345678901234567890}', "a", False),
        (b'{"model":"' + b"m" * 10_240 + b'"}', "m" * 10_240, False),
        (b'{"model":"a","x":"' + b"y" * 5_000_000 + b'"}', "a", False),
        (b'{"model":"a","x":' + b"[" * 200 + b"]" * 200 + b"}", "a", False),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_wishes(raw, model, stream):
    wish = read_wish(raw)
    assert (wish.model, wish.stream) == (model, stream)


@pytest.mark.parametrize(
    "raw",
    [
        b"", b" ", b"hello", b"{", b"}", b'{"model":"a"', b'{"model":"a"} x', b'{"model":"a"}{}', b'{"model":"a",}',
        b"{'model':'a'}", b'{model:"a"}', b"[]", b'["model"]', b'"model"', b"1", b"null", b"true", b"NaN",
        b'{"model":"a","x":NaN}', b'{"model":"a","x":Infinity}', b'{"model":"a","x":01}', b'{"model":"a","x":"\n"}',
        b'{"model":"a\xff"}', b'{"model":"a","x":"\xff\xfe"}', b'{"model":"a","\xc3":1}', b'{"model":"\xed\xa0\x80"}',
        b'\xef\xbb\xbf{"model":"a"}', '{"model":"a"}'.encode("utf-16"), '{"model":"a"}'.encode("utf-16-le"), b"\0" * 100,
        b'{"model":"a","x":' + b"[" * 100_000, b'{"model":"a","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 100_000, b'{"model":' + b"[" * 100_000, b"[" * 1_000_000,
        b'{"model":"a","x":"\\q"}', b'{"model":"a" "x":1}', b"model=a&x=1",
    ],
    ids=lambda value: repr(value)[:50],
)  # fmt: skip
def test_what_is_not_a_json_object(raw):
    with pytest.raises(InvalidJSON) as caught:
        read_wish(raw)
    assert len(caught.value.message) < 300
    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize(
    "raw",
    [
        b"{}", b'{"Model":"a"}', b'{"messages":[{"model":"a"}]}', b'{"model":null}', b'{"model":1}', b'{"model":true}',
        b'{"model":["a"]}', b'{"model":{"model":"a"}}', b'{"model":"a","model":null}', b'{"model":1.5e3}',
        b'{"model":[' + b"1," * 100_000 + b"1]}", '{"model":["ü"]}'.encode(),
    ],
    ids=lambda value: repr(value)[:50],
)  # fmt: skip
def test_what_names_no_model(raw):
    with pytest.raises(MissingModel) as caught:
        read_wish(raw)
    assert caught.value.param == "model"
    assert len(caught.value.message) < 300


# --- priority, ids, encodings -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        (None, Priority.NORMAL), ("high", Priority.HIGH), ("normal", Priority.NORMAL), ("low", Priority.LOW),
        ("HIGH", Priority.HIGH), (" Low ", Priority.LOW),
    ],
)  # fmt: skip
def test_priorities(sent, meant):
    assert priority(sent) is meant


@pytest.mark.parametrize("sent", ["", " ", "urgent", "1", "0", "high,low", "hi gh", "hïgh", "h" * 10_000, "\x00"])
def test_priorities_that_do_not_exist(sent):
    with pytest.raises(InvalidPriority, match="it may be high, normal or low") as caught:
        priority(sent)
    assert caught.value.param == "X-Request-Priority"
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("sent", ["a", "!~", "req-1", "x" * 128, "550e8400-e29b-41d4-a716-446655440000"])
def test_an_id_is_echoed(sent):
    assert request_id(sent) == sent


@pytest.mark.parametrize("sent", [None, "", "x" * 129, "a b", "a\n", "a\r\nX: y", "\x7f", "ü", "a\t", " a"])
def test_what_is_no_id_is_replaced(sent):
    made = request_id(sent)
    assert made != sent
    assert request_id(made) == made
    assert request_id(sent) != made


@pytest.mark.parametrize("sent", [None, "", "identity", " Identity "])
def test_plain_bodies(sent):
    check_encoding(sent)


@pytest.mark.parametrize("sent", ["gzip", "br", "identity, gzip", "zstd", "x" * 10_000])
def test_encoded_bodies(sent):
    with pytest.raises(UnsupportedMediaType):
        check_encoding(sent)


def test_every_path_of_the_contract_is_there():
    assert {
        "/v1/chat/completions", "/v1/embeddings", "/v1/completions", "/v1/responses", "/v1/messages",
        "/v1/messages/count_tokens", "/v1/rerank", "/v1/reranking", "/rerank", "/infill", "/completion", "/tokenize",
        "/detokenize", "/apply-template", "/chat/completions", "/embeddings", "/completions", "/responses",
    } <= INFERENCE_PATHS  # fmt: skip


# --- Host -------------------------------------------------------------------------------------------


def admitted(host: str | None, /, **api) -> bool:
    try:
        Admission(ApiConfig(**api)).check_host(host)
    except HostNotAllowed as error:
        return len(error.message) > 400
    return True


@pytest.mark.parametrize(
    "host",
    [
        None, "localhost", "localhost:8000", "LOCALHOST:1", "localhost.", "localhost.:8000", "127.0.0.1", "127.0.0.1:80",
        "[::1]", "[::1]:8000", "localhost:", " localhost ",
    ],
)  # fmt: skip
def test_our_own_names(host):
    assert admitted(host)


FOREIGN = [
    "", ":8000", "evil.com", "evil.com:8000", "localhost.evil.com", "evil-localhost", "127.0.0.1.evil.com", "127.0.0.2",
    "localhost@evil.com", "localhost:80@evil.com", "localhost:@evil.com", "user:localhost@evil.com", "evil.com#localhost",
    "localhost/", "localhost/evil.com", "localhost\\evil.com", "localhost evil.com", "localhost,evil.com", "localhost:80:80",
    "localhost:evil", "[::1]evil.com", "[::1]:80@evil.com", "[::1", "::1", "[localhost]", "[::1]]", "[]", "[::2]", "0.0.0.0",
    "2130706433", "0x7f.1", "127.1", "127.0.0.1%00", "localhost...", "*", "\x00localhost", "loc\u0430lhost", "x" * 10_000,
]  # fmt: skip


@pytest.mark.parametrize("host", FOREIGN, ids=lambda value: repr(value)[:40])
def test_foreign_names(host):
    assert not admitted(host)


@given(st.text(st.characters(max_codepoint=255), max_size=30))
def test_no_name_but_ours(host):
    ours = re.fullmatch(r"\s*(localhost\.?|127\.0\.0\.1\.?|\[::1\])(:\d*)?\s*", host.lower())
    assert admitted(host) == bool(ours)


def test_the_name_we_listen_on_is_ours():
    assert admitted("Box.lan:8000", host="box.LAN")
    assert admitted("192.168.1.5", host="192.168.1.5")
    assert admitted("[fe80::1]:8000", host="fe80::1")
    assert not admitted("192.168.1.6", host="192.168.1.5")


@pytest.mark.parametrize("listens", ["0.0.0.0", "::"])
def test_listening_everywhere_any_address_is_ours_but_no_name(listens):
    assert admitted("192.168.1.5:8000", host=listens)
    assert admitted("[2001:db8::1]:8000", host=listens)
    assert admitted("localhost", host=listens)
    assert not admitted("evil.com", host=listens)
    assert not admitted("192.168.1.5.evil.com", host=listens)
    assert not admitted("192.168.1.5@evil.com", host=listens)
    assert not admitted("2130706433", host=listens)


def test_a_list_of_names_is_the_whole_list():
    api = {"allowed_hosts": ("Router.example", "10.0.0.1"), "host": "0.0.0.0"}
    assert admitted("router.EXAMPLE:443", **api)
    assert admitted("10.0.0.1", **api)
    assert not admitted("localhost", **api)
    assert not admitted("192.168.1.5", **api)
    assert not admitted("sub.router.example", **api)
    assert admitted("anything.at.all", allowed_hosts=("*",))
    assert not admitted("localhost", allowed_hosts=())


# --- Origin -----------------------------------------------------------------------------------------


def let_in(method: str, host: str | None, origin: str | None, /, **api) -> bool:
    try:
        Admission(ApiConfig(**api)).check_origin(method, host, origin)
    except OriginNotAllowed:
        return False
    return True


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_anyone_may_ask_to_read(method):
    assert let_in(method, "localhost", "https://evil.com")


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        (None, True), ("http://localhost:8000", True), ("HTTP://LOCALHOST:8000", False), ("https://localhost:8000", True),
        ("http://LocalHost:8000", True), ("https://ui.example", True),
        ("https://evil.com", False), ("null", False), ("", False), ("http://localhost", False), ("http://localhost:8001", False),
        ("https://ui.example.evil.com", False), ("https://ui.example:8443", False), ("http://ui.example", False),
        ("https://UI.example", False), ("https://ui.example/", False), ("file://localhost:8000", False),
        ("http://localhost:8000.evil.com", False), ("http://localhost:8000@evil.com", False), ("localhost:8000", False),
    ],
)  # fmt: skip
def test_who_may_change_something(origin, allowed):
    for method in ("POST", "PUT", "DELETE", "PATCH", "FOO"):
        assert let_in(method, "localhost:8000", origin, cors_origins=("https://ui.example",)) is allowed, method


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, True), ({"Sec-Fetch-Site": "none"}, True), ({"Sec-Fetch-Site": "same-origin"}, True),
        ({"Sec-Fetch-Site": "cross-site"}, False), ({"Sec-Fetch-Site": "same-site"}, False), ({"Sec-Fetch-Site": "?"}, False),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-User": "?1", "Sec-Fetch-Dest": "document"}, True),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-User": "?1", "Sec-Fetch-Dest": "iframe"}, False),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"}, False),
        ({"Origin": "https://ui.example", "Sec-Fetch-Site": "cross-site"}, True),
        ({"Origin": "https://evil.com", "Sec-Fetch-Site": "same-origin"}, False), ({"Origin": "null"}, False),
        ({"Origin": "", "Referer": "http://localhost:8000/"}, False),
        ({"Referer": "http://localhost:8000/ui/"}, True), ({"Referer": "https://ui.example/chat?a=b"}, True),
        ({"Referer": "https://evil.com/"}, False), ({"Referer": "https://evil.com"}, False),
        ({"Referer": "https://evil.com/", "Sec-Fetch-Site": "none"}, True), ({"Referer": "elsewhere"}, True),
    ],
)  # fmt: skip
def test_which_page_may_have_a_model_loaded_by_reading(headers, allowed):
    admission = Admission(ApiConfig(cors_origins=("https://ui.example",)))
    with nullcontext() if allowed else pytest.raises(OriginNotAllowed):
        admission.check_page("localhost:8000", headers.get)


def test_an_origin_without_a_host_is_foreign():
    assert not let_in("POST", None, "http://localhost")
    assert not let_in("POST", None, "http://")


# --- keys -------------------------------------------------------------------------------------------


def has_key(authorization: str | None = None, x_api_key: str | None = None, *, path: str = "/v1/models", key="s3cret"):
    admission = Admission(ApiConfig(key=key))
    assert admission.needs_key == (key is not None)
    assert "s3cret" not in repr(admission)
    try:
        admission.check_key(path, authorization, x_api_key)
    except InvalidApiKey as error:
        return "s3cret" in error.message or error.headers != [("WWW-Authenticate", "Bearer")]
    return True


@pytest.mark.parametrize("authorization", ["Bearer s3cret", "bearer s3cret", "BEARER   s3cret ", "Bearer s3cret\t"])
def test_bearer(authorization):
    assert has_key(authorization)
    assert has_key(authorization, "wrong")


def test_x_api_key():
    assert has_key(None, "s3cret")
    assert has_key("Bearer wrong", "s3cret")
    assert has_key("Basic dXNlcjpwYXNz", " s3cret ")


@pytest.mark.parametrize(
    "sent",
    ["", "Bearer", "Bearer ", "Bearer wrong", "Bearer s3cre", "Bearer s3cret1", "Bearer S3CRET", "s3cret", "Basic s3cret",
     "Bearers3cret", "Bearer s3cret s3cret", "Token s3cret", "Bearer \x00", "Bearer ü\xff", "Bearer " + "x" * 100_000],
)  # fmt: skip
def test_wrong_keys(sent):
    assert not has_key(sent)
    if sent != "s3cret":
        assert not has_key(None, sent)


def test_none_at_all():
    assert not has_key()
    assert has_key(key=None)
    assert has_key("Bearer whatever", key=None)


def test_probes_need_none():
    for path in (*OPEN_PATHS, "/ui/", "/ui/app.js"):
        assert has_key(path=path)
    for path in (
        "/uix",
        "/x/ui/",
        "//ui/",
        "/v1/models",
        "/Health",
        "/health/",
        "/health/../v1/models",
        "//health",
        "/metrics",
    ):
        assert not has_key(path=path)
