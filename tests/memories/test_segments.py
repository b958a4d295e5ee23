"""Segments count tokens of the document, however rows are cut, packed and padded."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaics.memories import Layout


def looped(ids, mask, size):
    """For each row and position of a document sequence: document, place in it, segment, place in that."""
    found = []
    for row_ids, row_mask in zip(ids.tolist(), mask.tolist(), strict=True):
        document, number, before, line = -1, 0, None, []
        for i, real in zip(row_ids, row_mask, strict=True):
            if not real:
                line.append(None)
                continue
            if before is None or i != before:
                document, number, before = document + 1, 0, i
            line.append((document, number, number // size, number % size))
            number += 1
        found.append(line)
    return found


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_segments_of_any_call_are_those_of_the_whole(data):
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    time, size = data.draw(st.integers(1, 25)), data.draw(st.sampled_from([1, 2, 3, 7, 40]))
    ids = (torch.rand(3, time, generator=draw) < 0.15).cumsum(1)
    mask = torch.rand(3, time, generator=draw) < data.draw(st.sampled_from([0.6, 1.1]))
    expected = looped(ids, mask, size)
    rows, begin, seen = None, 0, [dict() for _ in range(3)]
    while begin < time:
        piece = data.draw(st.integers(1, time - begin))
        part = slice(begin, begin + piece)
        layout, order, rows = Layout.of(3, piece, mask[:, part], ids[:, part], rows, begin)
        segments = layout.segments(size, torch.device("cpu"))
        order = torch.arange(piece).expand(3, piece) if order is None else order
        x = torch.randn(3, piece, 2, 2, generator=draw)
        gathered = segments.gather(x)
        assert gathered.shape == (3, segments.count, size, 2, 2)
        assert (gathered[~segments.filled] == 0).all()
        back = segments.scatter(gathered)
        for row in range(3):
            for here in range(piece):
                known = expected[row][begin + int(order[row, here])]
                if known is None:
                    continue
                document, number, segment, place = known
                assert torch.equal(back[row, here], x[row, here])
                index = int(segments.index[row, here])
                assert int(segments.position[row, here]) == place
                assert torch.equal(gathered[row, index, place], x[row, here])
                assert bool(segments.filled[row, index, place])
                if place == 0:
                    assert bool(segments.opens[row, index])
                    assert bool(segments.begins[row, index]) == (number == 0)
                # Two tokens lie in one segment of this call if and only if they do so in the document.
                assert seen[row].setdefault((begin, index), (document, segment)) == (document, segment)
            assert int(segments.filled[row].sum()) == int(mask[row, part].sum())
        begin += piece


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_calls_of_a_segment_each_hold_every_token_once_in_the_order_of_its_document(data):
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    time, size = data.draw(st.integers(1, 25)), data.draw(st.sampled_from([1, 2, 3, 7, 40]))
    ids = (torch.rand(3, time, generator=draw) < 0.15).cumsum(1)
    mask = torch.rand(3, time, generator=draw) < data.draw(st.sampled_from([0.6, 1.1]))
    expected = looped(ids, mask, size)
    rows, begin = None, 0
    while begin < time:
        piece = data.draw(st.integers(1, time - begin))
        part = slice(begin, begin + piece)
        layout, order, rows = Layout.of(3, piece, mask[:, part], ids[:, part], rows, begin)
        order = torch.arange(piece).expand(3, piece) if order is None else order
        seen = [[] for _ in range(3)]
        for call, index in layout.calls(size, torch.device("cpu")):
            assert index.shape == call.start.shape == (3, call.time) and call.batch == 3
            lengths = [call.time] * 3 if call.length is None else call.length.tolist()
            assert max(lengths) == call.time or (lengths == [0, 0, 0] and call.time == 1)
            assert (call.length is None) == (min(lengths) == call.time)
            position = call.position(torch.device("cpu"))
            for row, length in enumerate(lengths):
                assert (index[row, length:] == piece).all()
                known = [expected[row][begin + int(order[row, i])] for i in index[row, :length]]
                assert [number for _, number, _, _ in known] == position[row, :length].tolist()
                assert len({(document, segment) for document, _, segment, _ in known}) <= 1
                seen[row] += index[row, :length].tolist()
        real = mask[:, part].sum(1).tolist()
        assert seen == [list(range(n)) for n in real]
        begin += piece


def test_segments_refuse_an_impossible_size():
    with pytest.raises(ValueError, match="give at least 1"):
        Layout(1, 3).segments(0, torch.device("cpu"))
