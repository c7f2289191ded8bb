import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_router.config.aliases import LONGEST, OWN_ENDINGS, RESERVED, alias_problem


@pytest.mark.parametrize(
    "alias",
    ["a", "7", "qwen2.5-7b", "org/model:q4_K_M", "a/b/c", "Status", "loads", "status-2", "a/statuses", "x" * LONGEST],
)
def test_good_aliases(alias):
    assert alias_problem(alias) is None


@pytest.mark.parametrize(
    ("alias", "word"),
    [
        ("", "starts with"),
        ("-a", "starts with"),
        ("/a", "starts with"),
        (".a", "starts with"),
        ("a b", "starts with"),
        ("ä", "starts with"),
        ("a\n", "starts with"),
        ("a?b", "starts with"),
        ("a%2f", "starts with"),
        ("x" * (LONGEST + 1), "at most 200 characters, this one 201"),
        ("a//b", "'//'"),
        ("a/", "'//'"),
        ("a/../b", "'..'"),
        ("a/.", "'.'"),
        ("status/stream", "reserved"),
        *[(alias, "reserved") for alias in sorted(RESERVED)],
        *[("a" + ending, "does not end in") for ending in OWN_ENDINGS],
    ],
)
def test_bad_aliases_say_why(alias, word):
    reason = alias_problem(alias)
    assert reason is not None
    assert word in reason


@given(st.text(max_size=30))
def test_whatever_passes_is_safe_in_a_path(alias):
    if alias_problem(alias) is None:
        assert re.fullmatch(r"[A-Za-z0-9._:/-]+", alias)
        assert "//" not in f"/v1/models/{alias}/status"
