import pytest

from trio_router.backend.fit import fit_environment
from trio_router.memory.settings import may_shrink

OFF = {"LLAMA_ARG_FIT": "off"}
TALK = {"LLAMA_ARG_LOG_VERBOSITY": "4"}


@pytest.mark.parametrize("flags", ["-c 512 -ngl 99", "--ctx_size 0 --n-gpu-layers all", "-ngl 0 -c 1 --jinja"])
@pytest.mark.parametrize("gpu", [True, False])
def test_what_is_said_is_not_shrunk(flags: str, *, gpu: bool) -> None:
    assert fit_environment(flags.split(), gpu=gpu) == OFF


@pytest.mark.parametrize("flags", ["", "-c 512", "-ngl 99", "-c 512 -ngl auto", "-c 512 -ngl -1", "-ngl -c 512"])
def test_else_it_is_asked_what_it_chose(flags: str) -> None:
    assert fit_environment(flags.split(), gpu=True) == TALK
    assert fit_environment(flags.split(), gpu=False) == {}


def test_where_every_gpu_is_hidden_the_context_is_all_that_can_be_said() -> None:
    assert fit_environment(["-c", "512"], gpu=False, hidden=True) == OFF
    assert fit_environment(["-c", "512", "--fit", "on"], gpu=False, hidden=True) == {}
    assert fit_environment(["-np", "2"], gpu=False, hidden=True) == {}


@pytest.mark.parametrize(
    "flags", ["-c 512 -ngl 99 --fit on", "-c 512 -ngl 9 -fit off", "-c 512 -lv 2", "--log-disable"]
)
def test_flags_of_the_models_own_stand_above(flags: str) -> None:
    assert fit_environment(flags.split(), gpu=True) == {}


@pytest.mark.parametrize(
    ("flags", "shrinks"),
    [("-c 512 -ngl 99", False), ("-c 512", True), ("", True), ("--fit off", False), ("-c 512 -ngl 99 --fit on", True)],
)
def test_whether_it_may_be_made_smaller(flags: str, shrinks: bool) -> None:
    assert may_shrink(flags.split()) is shrinks
