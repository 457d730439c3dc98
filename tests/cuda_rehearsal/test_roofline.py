"""The time that the roofline derives for a kernel."""

from __future__ import annotations

import pytest

from benchmarks.fake_cuda.costs import Cost
from benchmarks.roofline import CARDS


def test_a_kernel_takes_as_long_as_its_operations_its_bytes_or_the_shortest_kernel() -> None:
    card = CARDS["a100"]
    assert card.seconds(Cost("matmul", "product", 10**6, 312 * 10**12)) == pytest.approx(1 / 0.6)
    assert card.seconds(Cost("elementwise", "memory", 2_039 * 10**9, 0)) == pytest.approx(1 / 0.8)
    assert card.seconds(Cost("matmul", "thin product", 2_039 * 10**9, 0)) == pytest.approx(2 / 0.8)
    assert card.seconds(Cost("elementwise", "memory", 4, 0)) == 2.5e-6
