import inspect

import pytest
import trio

from trio_router import errors
from trio_router.errors import (
    BackendTimeout,
    BackendUnavailable,
    InvalidJSON,
    InvalidPriority,
    LoadTimeout,
    ModelFailed,
    QueueFull,
    QueueTimeout,
    RouterError,
    ShuttingDown,
    UnknownModel,
    UnsupportedMediaType,
)
from trio_router.fleet.scheduler import Priority
from trio_router.telemetry.events import Outcome
from trio_router.web.inference import Asked, outcome_of

ALL = [found for _, found in inspect.getmembers(errors, inspect.isclass) if issubclass(found, RouterError)]


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (200, Outcome.OK), (204, Outcome.OK), (304, Outcome.OK), (400, Outcome.CLIENT_ERROR), (404, Outcome.CLIENT_ERROR),
        (429, Outcome.CLIENT_ERROR), (500, Outcome.BACKEND_ERROR), (501, Outcome.BACKEND_ERROR),
        (503, Outcome.BACKEND_ERROR),
    ],
)  # fmt: skip
def test_the_backends_own_status(status, outcome):
    assert outcome_of(None, status) is outcome


@pytest.mark.parametrize(
    ("kind", "outcome"),
    [
        (QueueTimeout, Outcome.TIMEOUT), (LoadTimeout, Outcome.TIMEOUT), (BackendTimeout, Outcome.TIMEOUT),
        (errors.DeadlineExceeded, Outcome.TIMEOUT), (errors.DeadlineUnreachable, Outcome.REJECTED),
        (QueueFull, Outcome.REJECTED), (ModelFailed, Outcome.REJECTED), (ShuttingDown, Outcome.REJECTED),
        (InvalidJSON, Outcome.CLIENT_ERROR), (UnknownModel, Outcome.CLIENT_ERROR),
        (errors.BackendBroken, Outcome.BACKEND_ERROR), (errors.BackendCrashed, Outcome.BACKEND_ERROR),
    ],
)  # fmt: skip
def test_our_own_errors(kind, outcome):
    assert outcome_of(kind("x"), kind.status) is outcome


def test_a_stream_that_broke_is_the_backends_fault_although_it_began_with_200():
    assert outcome_of(BackendUnavailable("x"), 200) is Outcome.BACKEND_ERROR
    assert outcome_of(BackendTimeout("x"), 200) is Outcome.TIMEOUT


@pytest.mark.parametrize("kind", ALL)
def test_every_error_has_an_outcome_and_none_is_fine(kind):
    unwanted = {Outcome.OK} if kind is errors.RequestCancelled else {Outcome.OK, Outcome.CANCELLED}
    assert outcome_of(kind("x"), kind.status) not in unwanted


async def test_a_client_that_left():
    with trio.CancelScope() as scope:
        scope.cancel()
        with pytest.raises(trio.Cancelled) as caught:
            await trio.lowlevel.checkpoint()
        assert outcome_of(caught.value, 499) is Outcome.CANCELLED
    assert outcome_of(trio.BrokenResourceError(), 200) is Outcome.CANCELLED
    assert outcome_of(GeneratorExit(), 200) is Outcome.CANCELLED


def test_the_first_of_several_headers_counts():
    asked = Asked.of("/x", "/x", [(b"x-request-priority", b"low"), (b"x-request-priority", b"high")])
    assert (asked.priority, asked.problem) == (Priority.LOW, None)


@pytest.mark.parametrize(
    ("headers", "error"),
    [
        ([(b"x-request-priority", b"urgent")], InvalidPriority),
        ([(b"x-request-priority", b"\xff")], InvalidPriority),
        ([(b"content-encoding", b"gzip"), (b"x-request-priority", b"urgent")], UnsupportedMediaType),
    ],
)
def test_a_head_that_cannot_be_answered(headers, error):
    assert type(Asked.of("/x", "/x", headers).problem) is error
