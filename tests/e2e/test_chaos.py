"""A minute in which everything goes wrong."""

import pytest

from benchmarks import chaos

pytestmark = [pytest.mark.e2e, pytest.mark.once]

SEED = 20_261_123
SECONDS = 60.0


@pytest.mark.timeout(400)  # a busy machine takes its time to learn what is right
def test_a_minute_of_chaos(real_llama, smollm2, tmp_path):
    assert real_llama.exists()
    assert smollm2.exists()
    found = chaos.run(tmp_path, SECONDS, SEED).ledger
    assert found.violations == []
    assert found.fates.total() == found.asked
    assert found.fates["answered"] > 100
    assert found.fates["left"] > 10
    assert found.faults.total() > 20
    assert len(found.faults) > 12
