import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_router.config.flags import OWNED, BadSlots, last_value, owned_reason, slots_in

NAMES = {"-c", "--ctx-size"}


@pytest.mark.parametrize("flag", sorted(OWNED))
def test_owned_flags_are_named_with_a_reason(flag):
    reason = owned_reason(flag)
    assert reason is not None
    assert reason.startswith(f"{flag} belongs to the router: ")


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("--api_key", "--api-key"),
        ("--api_key_file", "--api-key-file"),
        ("--host=0.0.0.0", "--host"),
        ("--host 0.0.0.0", "--host"),
        ("--ssl_key-file=x", "--ssl-key-file"),
        ("-m=x.gguf", "-m"),
        ("-m x.gguf", "-m"),
        ("--gpt-oss-20b-default", "--gpt-oss-20b-default"),
        ("--fim_qwen_14b_spec", "--fim-qwen-14b-spec"),
        ("--embd-gemma-default", "--embd-gemma-default"),
    ],
)
def test_owned_flags_in_disguise(written, name):
    assert (owned_reason(written) or "").startswith(f"{name} belongs")


@pytest.mark.parametrize(
    "flag",
    [
        *(
            "-c",
            "-ngl",
            "--jinja",
            "--mmproj",
            "-md",
            "-hfd",
            "--hf-repo-draft",
            "--model-draft",
            "-mg",
            "--no-host",
            "-mm",
        ),
        *(
            "--embedding",
            "--spec-default",
            "--metrics",
            "--slots",
            "--HOST",
            "-M",
            "-api-key",
            "host",
            "",
            "-",
            "--",
            "-1",
        ),
        *("0.0.0.0", "--hosts", "--timeout", "--path", "-mv", "/models/a --host", "-a_", "--chat-template-kwargs"),
    ],
)
def test_everything_else_passes(flag):
    assert owned_reason(flag) is None


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        ([], None),
        (["-c"], None),
        (["-c", "1"], "1"),
        (["-c", "1", "--ctx-size", "2"], "2"),
        (["--ctx-size", "2", "-c", "1"], "1"),
        (["--ctx_size", "3"], "3"),
        (["-ngl", "9", "-c", "1", "--jinja"], "1"),
        (["--ctx-size=4"], None),  # llama-server refuses it
        (["-c", "1", "-c"], "1"),
        (["-C", "1"], None),
    ],
)
def test_the_last_value_wins(flags, value):
    assert last_value(flags, NAMES) == value


@pytest.mark.parametrize(
    ("flags", "slots"),
    [
        ([], None),
        (["-c", "4096"], None),
        (["-np", "4"], 4),
        (["--parallel", "2", "-np", "8"], 8),
        (["-np", "0", "--parallel", "1"], 1),
        (["-np", "08"], 8),
    ],
)
def test_slots(flags, slots):
    assert slots_in(flags) == slots


@pytest.mark.parametrize("value", ["0", "-1", "", "x", "4x", "+4", "1.0", "1e3", " 4", "٤", "9999999"])
def test_slots_that_are_none(value):
    with pytest.raises(BadSlots, match="expected an int >= 1"):
        slots_in(["-np", value])


def test_slots_without_a_number():
    with pytest.raises(BadSlots, match="got nothing"):
        slots_in(["-c", "1", "--parallel"])


@given(st.lists(st.sampled_from(["-np", "--parallel", "-c", "1", "2", "--host", "x", ""])))
def test_the_scanner_says_a_number_or_why_not(flags):
    try:
        slots = slots_in(flags)
    except BadSlots:
        assert {"-np", "--parallel"} & set(flags)
    else:
        assert slots is None or slots >= 1


@given(st.text())
def test_any_argument_is_owned_or_not(argument):
    reason = owned_reason(argument)
    assert reason is None or argument.startswith("-")


@pytest.mark.parametrize("argument", ["-c 512", "--ctx-size  512", "-ngl\t99", "--override-kv a=int:1"])
def test_what_is_written_as_in_a_shell(argument: str) -> None:
    flag, value = argument.split(maxsplit=1)[0], argument.split()[1]
    assert owned_reason(argument) == f"{flag} and {value} are two arguments to llama-server: make them two entries"


@pytest.mark.parametrize("argument", ["- c 512", "-1", "-0.5 x", "a -c 512", "", "--flag", "--flag=a b"])
def test_what_is_not(argument: str) -> None:
    assert owned_reason(argument) is None
