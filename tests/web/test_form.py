"""Forms: what of them is read, and that they come to llama-server as they were sent, by either way in."""

import contextlib
from io import BytesIO

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.formparser import MultiPartParser

from tests.web.site import open_site
from tests.web.test_app import Server
from trio_router.errors import InvalidForm, InvalidRequest, MissingModel
from trio_router.web.form import MAX_PARTS, boundary_of, model_of

PATH = "/v1/audio/transcriptions"
SOUND = bytes(range(256)) * 4


def part(name: str, value: bytes, *, filename: str | None = None) -> bytes:
    more = "" if filename is None else f'; filename="{filename}"\r\nContent-Type: audio/wav'
    return b'--b\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n' % (name.encode(), more.encode(), value)


MODEL = part("model", b"qwen")
FILE = part("file", SOUND, filename="a.wav")
END = b"--b--\r\n"
FORM = FILE + MODEL + END


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        (None, None), ("", None), ("application/json", None), ("multipart/mixed; boundary=b", None),
        ("multipart/form-data; boundary=b", b"b"), ('Multipart/Form-Data; charset=utf-8; boundary="a b"', b"a b"),
    ],
)  # fmt: skip
def test_the_boundary(content_type, boundary):
    assert boundary_of(content_type) == boundary


@pytest.mark.parametrize("parameters", ["", "; boundary=", '; boundary=""', "; boundary=" + "x" * 71, "; boundary=ü"])
def test_no_boundary(parameters):
    with pytest.raises(InvalidForm):
        boundary_of("multipart/form-data" + parameters)


@pytest.mark.parametrize(
    "form",
    [
        FORM, MODEL + FILE + END, MODEL + END, FORM + b"an epilogue", FORM.removesuffix(b"\r\n"),
        part("model", b"x", filename="model") + MODEL + END,  # a file is no field
        FORM.replace(b'name="model"', b"name=model"), FORM.replace(b"Content-Disposition", b"CONTENT-disposition "),
        part("file", b"\r\n--a\r\n\r\n--\r\n--", filename="a") + MODEL + END,
        part("file", b"", filename="a") + MODEL + END,
        b"--b\r\n\r\nno head\r\n" + MODEL + END,
    ],
)  # fmt: skip
def test_the_model(form):
    assert model_of(form, b"b") == model_of(bytearray(form), b"b") == "qwen"


@pytest.mark.parametrize(
    "form",
    [
        b"", b"--b", b"--c\r\n", b"{}", MODEL, FILE, FORM.replace(b"--b--", b"--b-"), FORM.replace(b"\r\n", b"\n"),
        b"\r\n" + FORM, b"--bb" + FORM, part("file", b"\r\n--bc\r\n", filename="a") + MODEL + END,
        b"--b\r\nX: " + b"x" * 9000 + b"\r\n\r\n\r\n" + FORM, part("a", b"") * MAX_PARTS + FORM,
    ],
)  # fmt: skip
def test_no_form(form):
    with pytest.raises(InvalidForm):
        model_of(form, b"b")


@pytest.mark.parametrize("form", [END, FILE + END, part("model" + "l" * 300, b"qwen") + END])
def test_no_model(form):
    with pytest.raises(MissingModel):
        model_of(form, b"b")
    assert model_of(form, b"b", "other") == "other"


def test_as_many_parts_as_there_may_be():
    assert model_of(part("a", b"") * (MAX_PARTS - 1) + MODEL + END, b"b") == "qwen"
    with pytest.raises(InvalidForm, match="more than 100 parts"):
        model_of(part("a", b"") * MAX_PARTS + MODEL + END, b"b")
    assert model_of(part("model", b"\xff" + b"x" * 9000) + END, b"b").startswith("\ufffdx")


NAMES = st.sampled_from(["model", "file", "language", "prompt"])
VALUES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20)


@given(
    fields=st.dictionaries(NAMES, VALUES | st.lists(VALUES, max_size=2)),
    sent=st.dictionaries(NAMES, st.binary(max_size=50)),
)
def test_it_is_what_others_read(fields, sent):
    """httpx writes it, Werkzeug reads it."""
    request = httpx.Request("POST", "http://x", data=fields, files={**sent, "more": b""})
    form = request.read()
    boundary = boundary_of(request.headers["content-type"])
    assert boundary is not None
    found, kept = MultiPartParser().parse(BytesIO(form), boundary, len(form))
    for files in kept.listvalues():
        for file in files:
            file.close()
    theirs = found.getlist("model")
    try:
        ours = model_of(form, boundary)
    except MissingModel:
        assert not theirs
    else:
        assert ours == theirs[-1]


@given(
    form=st.binary(max_size=30) | st.lists(st.sampled_from([b"--b", b"\r\n", b"--", b"x", b"\r\n\r\n", MODEL, FILE]))
)
def test_nothing_else_is_raised(form):
    given_ = form if isinstance(form, bytes) else b"".join(form)
    with contextlib.suppress(InvalidRequest):
        model_of(given_, b"b")


KIND = "multipart/form-data; boundary=b"


async def test_it_goes_as_it_came(sockets, way):
    server = Server()
    async with open_site(sockets, server, stop_at_once=True, cache_affinity=True, slots=2) as site:
        for path in (PATH, f"/upstream/qwen{PATH}", f"{PATH}?x=1"):
            assert (await site.ask("POST", path, [*way, ("Content-Type", KIND)], FORM)).status == 200
            head, _, body = server.asked.pop().partition(b"\r\n\r\n")
            assert body == FORM
            assert f"\r\nContent-Type: {KIND}\r\n".encode() in head
        assert [told.endpoint for told in await site.told(3)] == [PATH] * 3
        assert site.connections.plane.known_heads._heads == {}


@pytest.mark.parametrize(
    ("kind", "form", "code"),
    [
        (KIND, FILE + END, (400, "missing_model")),
        (KIND, part("model", b"other") + END, (404, "model_not_found")),
        (KIND, MODEL, (400, "invalid_form")),
        ("multipart/form-data", FORM, (400, "invalid_form")),
        ("audio/wav", SOUND, (400, "invalid_json")),
    ],
)
async def test_what_is_refused(sockets, way, kind, form, code):
    server = Server()
    async with open_site(sockets, server) as site:
        assert (await site.ask("POST", PATH, [*way, ("Content-Type", kind)], form)).code == code
        assert server.asked == []


async def test_an_object_is_for_llama_server_to_judge(sockets, way):
    """It says that there is no file."""
    server = Server()
    async with open_site(sockets, server) as site:
        await site.ask("POST", PATH, [*way, ("Content-Type", "application/json")], b'{"model":"qwen"}')
        assert server.headers()["content-type"] == "application/json"


async def test_the_default_model(sockets, way):
    async with open_site(sockets, Server(), default_model="qwen") as site:
        assert (await site.ask("POST", PATH, [*way, ("Content-Type", KIND)], FILE + END)).status == 200
