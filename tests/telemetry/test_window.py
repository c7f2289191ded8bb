from trio_router.telemetry.window import Counts, Window


def test_what_is_too_old_is_forgotten() -> None:
    window = Window(60, 1.0)
    window.at(100.2).requests += 1
    window.at(100.9).requests += 1
    window.at(130.0).requests += 1
    assert window.total(159.99).requests == 3
    assert window.total(160.0).requests == 1
    assert window.total(189.9).requests == 1
    assert window.total(190.0).requests == 0


def test_a_bucket_is_used_again() -> None:
    window = Window(3, 1.0)
    for now in range(10):
        window.at(float(now)).requests += now
    assert window.total(9.5).requests == 7 + 8 + 9
    window.at(1000.0).requests += 1
    assert window.total(1000.0).requests == 1


def test_sums() -> None:
    one = Counts(requests=2, succeeded=1, timed=2, seconds=3.0, input_tokens=5, output_tokens=7)
    one.errors_by_type["queue_full"] += 1
    whole = Counts()
    whole.add(one)
    whole.add(one)
    assert (whole.requests, whole.errors, whole.timed, whole.seconds) == (4, 2, 4, 6.0)
    assert (whole.input_tokens, whole.output_tokens) == (10, 14)
    assert whole.errors_by_type == {"queue_full": 2}
    assert whole.mean_ms == 1500.0
    assert Counts().mean_ms is None
