"""How a batch is dealt out. What comes of it is `test_mesh.py`'s."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cookbook.engine.training.partition import deal_out

lengths_of_batches = st.lists(st.integers(1, 500), min_size=1, max_size=40)


@given(lengths_of_batches, st.integers(1, 9))
def test_every_sequence_goes_to_one_share_in_order(lengths: list[int], num_shares: int) -> None:
    shares = deal_out(lengths, num_shares)
    assert len(shares) == num_shares
    assert sorted(index for share in shares for index in share) == list(range(len(lengths)))
    assert all(share == sorted(share) for share in shares)


@given(lengths_of_batches, st.integers(1, 9))
def test_no_share_has_more_than_a_sequence_too_much(lengths: list[int], num_shares: int) -> None:
    """The longest share without its last sequence was the shortest when that came."""
    tokens = [sum(lengths[index] for index in share) for share in deal_out(lengths, num_shares)]
    assert max(tokens) - min(tokens) <= max(lengths)


@given(lengths_of_batches)
def test_one_share_is_the_batch(lengths: list[int]) -> None:
    assert deal_out(lengths, 1) == [list(range(len(lengths)))]


def test_fewer_sequences_than_shares_leave_some_empty() -> None:
    assert sorted(deal_out([7, 3], 4)) == [[], [], [0], [1]]
