"""A minute in which everything goes wrong."""

import pytest

from benchmarks import chaos

pytestmark = pytest.mark.e2e

SEED = 20_261_123
SECONDS = 60.0


def test_a_minute_of_chaos(real_llama, smollm2, tmp_path):
    assert real_llama.exists()
    assert smollm2.exists()
    found = chaos.run(tmp_path, SECONDS, SEED)
    assert found.violations == []
    assert found.fates["answered"] > 100
    assert found.fates["left"] > 10
    assert found.faults.total() > 20
