"""Which pairs a position may read, against a loop over all of them."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaics.ops.kernel_regression import ALL_PAIRS, Reach
from mosaics.ops.kernel_regression.reach import is_empty, outside


@settings(deadline=None, max_examples=100)
@given(
    time=st.integers(1, 12),
    older=st.lists(st.integers(0, 6), min_size=2, max_size=2),
    delay=st.none() | st.integers(0, 9),
    window=st.none() | st.integers(1, 9),
    documents=st.booleans(),
    rows_differ=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_reach_spans_the_slots_that_a_loop_finds(time, older, delay, window, documents, rows_differ, seed):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(-8, time, (2, time), generator=generator).cummax(1).values if documents else None
    older = older if rows_differ else older[:1] * 2  # pairs of earlier calls, and slots that follow those of this one
    slots = max(older) + time + (2 if rows_differ else 0)
    reach = Reach(delay, window, start, torch.tensor(older) if rows_differ else None)
    reach = ALL_PAIRS if delay is None else reach
    first, end = reach.span(torch.empty(2, 1, time, 3), torch.empty(2, 1, slots, 3))
    masked, empty = outside(first, end, 0, slots).expand(2, 1, time, slots), is_empty(first, end).expand(2, 1, time)
    first, end = (x.expand(2, time) for x in (first, end))
    for row in range(2):
        for t in range(time):
            own, begin = older[row] + t, -older[row] if start is None else int(start[row, t])  # own slot, document
            found = [
                slot
                for slot in range(slots)
                if delay is None
                or slot - older[row] >= begin
                and own - slot >= delay
                and (window is None or own - slot < window)
            ]
            assert [slot for slot in range(slots) if not masked[row, 0, t, slot]] == found
            assert empty[row, 0, t] == (not found)
            assert list(range(first[row, t], end[row, t])) == found
            part = outside(first, end, 2, 5)[row, 0, t].tolist()
            assert part == [slot not in found for slot in range(2, 5)]
