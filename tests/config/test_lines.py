import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_router.config.lines import key_lines, line_of

DOCUMENT = '''\
# a comment with = and [brackets]
[api]
host = "x" # port = 1
port = 3
cors_origins = [
  "a#b", # ]
  'c]',
]

[system]
text = """
port = 4
"""
other = \'\'\'
x = 5\'\'\'
quotes = """a""""
inline = { a = 1, b = "}" }
after.dotted."key with.dot" = true

[models.'b.c']
flags = ["\\"", "x"]
[models . "d"]
flags = []
'''


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("api",), 2),
        (("api", "host"), 3),
        (("api", "port"), 4),
        (("api", "cors_origins"), 5),
        (("system",), 10),
        (("system", "text"), 11),
        (("system", "other"), 14),
        (("system", "quotes"), 16),
        (("system", "inline"), 17),
        (("system", "after"), 18),
        (("system", "after", "dotted", "key with.dot"), 18),
        (("models",), 20),
        (("models", "b.c"), 20),
        (("models", "b.c", "flags"), 21),
        (("models", "d", "flags"), 23),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_every_key_has_its_line(path, line, newline):
    text = DOCUMENT.replace("\n", newline)
    tomllib.loads(text)
    assert key_lines(text)[path] == line


def test_no_key_is_found_in_a_value():
    keys = {path[-1] for path in key_lines(DOCUMENT)}
    assert keys == {
        *("api", "host", "port", "cors_origins", "system", "text", "other", "quotes", "inline", "after"),
        *("dotted", "key with.dot", "models", "b.c", "flags", "d"),
    }
    assert ("system", "port") not in key_lines(DOCUMENT)


def test_what_has_no_line_is_found_at_what_is_around_it():
    lines = key_lines(DOCUMENT)
    assert line_of(lines, ("api", "cors_origins", 1)) == 5
    assert line_of(lines, ("system", "inline", "b")) == 17
    assert line_of(lines, ("models", "d", "model_path")) == 22
    assert line_of(lines, ("nowhere",)) is None
    assert line_of(lines, ()) is None


def test_many_keys_take_no_time():
    text = "\n".join(f"k{number} = {number}" for number in range(50_000))
    assert key_lines(text)["k49999",] == 50_000


VALUES = st.sampled_from(
    [
        "1",
        "true",
        '"s"',
        "'s'",
        '"""\n\nx = 1\n"""',
        "'''\n[y]\n'''",
        "[\n1,\n2\n]",
        "[]",
        "{ }",
        "{ a = [1] }",
        '"\\""',
        "1979-05-27",
    ]
)
KEYS = st.one_of(
    st.from_regex(r"[A-Za-z0-9_-]{1,5}", fullmatch=True), st.sampled_from(['"a b"', "'c.d'", '"#"', '"\\u0041z"'])
)


@given(
    st.lists(
        st.tuples(KEYS, VALUES, st.sampled_from(["", "# c = 1\n", "\n\n", " \t"])), unique_by=lambda entry: entry[0]
    )
)
def test_lines_of_any_flat_document(entries):
    text, expected = "", {}
    for key, value, before in entries:
        text += before
        name = next(iter(tomllib.loads(f"{key} = 1")))
        expected.setdefault((name,), text.count("\n") + 1)
        text += f"{key} = {value}\n"
    assert key_lines(text) == expected


@given(st.text(alphabet="a=.[]\"'#\n1", max_size=12))
def test_any_text_that_is_toml(text):
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    assert {path[0] for path in key_lines(text)} == document.keys()
