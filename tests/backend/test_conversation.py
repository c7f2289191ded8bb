"""Which slot a conversation goes on in."""

import json
from typing import Any

import pytest

from tests.fleet.fake_backend import backend_of
from trio_router.backend.backend import Slot
from trio_router.backend.conversation import MOST_TEXT_BYTES, Conversation, choose

SYSTEM = {"role": "system", "content": "be brief, and kind"}


def said(*texts: str, system: bool = True) -> list[dict[str, str]]:
    """Messages of a user and an assistant in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]
    return [SYSTEM, *messages] if system else messages


def talk(messages: Any, session: str | None = None) -> Conversation:
    return Conversation.of(json.dumps(messages).encode(), None if session is None else session.encode())


@pytest.fixture
def slots() -> list[Slot]:
    """Three; none has been used."""
    return list(backend_of(3).slots)


def hold(slot: Slot, conversation: Conversation | None, since: float) -> None:
    slot.holds, slot.since = conversation, since


def test_one_that_is_new_takes_a_slot_that_is_new(slots):
    hold(slots[0], talk(said("a")), 1.0)
    assert choose(slots, talk(said("b"))) in {1, 2}
    hold(slots[1], None, 2.0)
    assert choose(slots, talk(said("b"))) == 2


def test_one_that_is_new_takes_the_slot_that_was_not_used_for_longest(slots):
    for slot, since in zip(slots, (7.0, 5.0, 6.0), strict=True):
        hold(slot, talk(said(f"{since}")), since)
    assert choose(slots, talk(said("new"))) == 1


def test_one_that_goes_on_stays(slots):
    for slot, (name, since) in zip(slots, (("a", 5.0), ("b", 9.0), ("c", 7.0)), strict=True):
        hold(slot, talk(said(name)), since)
    for index, name in enumerate("abc"):
        assert choose(slots, talk(said(name, "answer", "more"))) == index
        assert choose(slots, talk(said(name))) == index  # the same once more


def test_the_longest_part_of_it_counts(slots):
    hold(slots[0], talk(said("a")), 3.0)
    hold(slots[1], talk(said("a", "answer", "more")), 1.0)
    hold(slots[2], talk(said("a", "answer")), 2.0)
    assert choose(slots, talk(said("a", "answer", "more", "answer", "still more"))) == 1


def test_what_was_said_otherwise_stays_where_its_beginning_is(slots):
    hold(slots[0], talk(said("a", "answer", "more")), 1.0)
    hold(slots[1], talk(said("b", "answer", "more")), 2.0)
    assert choose(slots, talk(said("b", "answer", "something else"))) == 1
    assert choose(slots, talk(said("a", "another answer", "more"))) == 0


def test_its_name_counts_most(slots):
    hold(slots[0], talk(said("a"), "one"), 1.0)
    hold(slots[1], talk(said("b"), "two"), 2.0)
    assert choose(slots, talk(said("a", "answer", "more"), "two")) == 1
    assert choose(slots, talk(said("a", "answer", "more"), "three")) == 0


def test_a_prompt_that_grows_is_a_conversation(slots):
    hold(slots[0], talk("Once upon"), 1.0)
    hold(slots[1], talk("Twice upon"), 2.0)
    assert choose(slots, talk("Twice upon a time")) == 1


def test_what_says_nothing_fits_nowhere(slots):
    hold(slots[0], Conversation.of(b"", None), 1.0)
    hold(slots[1], talk(said("a")), 2.0)
    assert choose(slots, Conversation.of(b"", None)) == 2
    assert choose(slots[:1], talk(said("a"))) == 0


def test_what_is_very_long_is_not_kept(slots):
    long = talk("x" * MOST_TEXT_BYTES, "mine")
    assert long.text == b""
    hold(slots[1], long, 9.0)
    assert choose(slots, talk("x" * MOST_TEXT_BYTES + "y", "mine")) == 1
