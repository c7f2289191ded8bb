import pytest

from trio_router.telemetry.availability import MAX_CHANGES, Availability


@pytest.mark.parametrize(
    ("changes", "now", "percentage"),
    [
        ([], 100.0, 100.0),
        ([(0.0, True)], 100.0, 100.0),
        ([(0.0, True)], 0.0, 100.0),
        ([(0.0, True), (75.0, False)], 100.0, 75.0),
        ([(0.0, True), (60.0, False), (70.0, True)], 100.0, 90.0),
        ([(0.0, True), (10.0, None)], 100.0, 100.0),
        ([(0.0, True), (10.0, None), (90.0, False)], 100.0, 50.0),
        ([(0.0, False), (1000.0, True)], 4600.0, 100.0),  # an hour ago it was back
        ([(0.0, False), (1000.0, True)], 3700.0, 75.0),
        ([(0.0, False)], 10_000.0, 0.0),
    ],
)
def test_percentage(changes: list[tuple[float, bool | None]], now: float, percentage: float) -> None:
    availability = Availability()
    for at, up in changes:
        availability.mark(at, up=up)
    assert availability.percentage(now) == percentage


def test_memory_is_bounded() -> None:
    availability = Availability()
    for number in range(5000):
        availability.mark(number * 0.01, up=bool(number % 2))
    assert len(availability._changes) == MAX_CHANGES
    assert 49 <= availability.percentage(50.0) <= 51
    for number in range(10):
        availability.mark(10_000.0 + number, up=bool(number % 2))
    assert len(availability._changes) <= 11
