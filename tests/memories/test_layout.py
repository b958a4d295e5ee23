import pytest
import torch

from mosaics.memories import Layout, Rows
from mosaics.memories.contract import Pairs


def test_layout_of_plain_rows_is_empty():
    layout, order, rows = Layout.of(2, 5)
    assert layout == Layout(2, 5) and order is None and rows == Rows()
    layout, order, _ = Layout.of(2, 5, torch.ones(2, 5), torch.full((2, 5), 7))
    assert layout.start is None and layout.length is None and order is None


def test_layout_of_compacts_padding_anywhere():
    mask = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 0, 0, 0]])
    layout, order, rows = Layout.of(2, 5, mask)
    assert order[0, :3].tolist() == [1, 3, 4] and order[1, :2].tolist() == [0, 1]
    assert layout.length.tolist() == [3, 2] and rows.tokens.tolist() == [3, 2]
    assert layout.is_padding.tolist() == [[False] * 3 + [True] * 2, [False] * 2 + [True] * 3]


def test_layout_of_finds_borders_where_the_id_changes():
    ids = torch.tensor([[4, 4, 9, 4, 4], [1, 1, 1, 1, 2]])
    layout, _, rows = Layout.of(2, 5, None, ids)
    assert layout.start.tolist() == [[0, 0, 2, 3, 3], [0, 0, 0, 0, 4]]  # an id that comes back is a new document
    assert rows.tokens.tolist() == [2, 1] and rows.document.tolist() == [4, 2]


def test_layout_of_finds_borders_between_real_tokens_only():
    ids, mask = torch.tensor([[3, 8, 3, 5, 5]]), torch.tensor([[1, 0, 1, 1, 0]])
    layout, _, rows = Layout.of(1, 5, mask, ids)
    assert layout.start[0, :3].tolist() == [0, 0, 2]
    assert rows.tokens.tolist() == [1] and rows.document.tolist() == [5]


def test_layout_of_continues_the_open_document():
    _, _, rows = Layout.of(2, 4, None, torch.tensor([[1, 1, 1, 1], [1, 1, 2, 2]]))
    layout, _, later = Layout.of(2, 3, None, torch.tensor([[1, 1, 5], [2, 2, 2]]), rows, stored=4)
    assert layout.start.tolist() == [[-4, -4, 2], [-2, -2, -2]] and later.tokens.tolist() == [1, 5]
    layout, _, later = Layout.of(2, 1, None, None, rows, stored=4)
    assert layout.start.tolist() == [[-4], [-2]] and later.tokens.tolist() == [5, 3]


def test_layout_of_a_row_without_tokens_keeps_its_document():
    _, _, rows = Layout.of(1, 3, None, torch.tensor([[1, 2, 2]]))
    layout, _, later = Layout.of(1, 2, torch.zeros(1, 2), torch.tensor([[9, 9]]), rows, stored=3)
    assert layout.length.tolist() == [0] and later.tokens.tolist() == [2] and later.document.tolist() == [2]


def test_layout_align_puts_the_last_real_position_last():
    layout = Layout(2, 3, None, torch.tensor([3, 1]))
    x = torch.arange(10.0).view(2, 5, 1)  # two older slots, three of this call
    assert layout.align(x)[..., 0].tolist() == [[0, 1, 2, 3, 4], [8, 9, 5, 6, 7]]


@pytest.mark.parametrize("limit", [None, 1, 3])
@pytest.mark.parametrize("grad", [False, True])
def test_pairs_append_keeps_the_newest_and_completes_the_last_value(limit, grad):
    pairs = Pairs(limit=limit)
    keys = torch.arange(20.0).view(1, 1, 20, 1).requires_grad_(grad)
    begin = 0
    for time in (2, 1, 1, 5, 1, 1, 9):
        new = keys[:, :, begin : begin + time]
        values = new if begin == 0 else keys[:, :, begin - 1 : begin + time]  # one more completes the last
        if begin:
            pairs.values[:, :, pairs.used - 1] = torch.nan
        with torch.set_grad_enabled(grad):
            held, stored = pairs.append(new.clone(), values.clone())
        older = begin if limit is None else min(begin, limit)
        expected = keys[:, :, begin - older : begin + time]
        assert torch.equal(held, expected) and torch.equal(stored, expected)
        pairs.settle(Layout(1, time))
        pairs.detach()
        begin += time
    assert limit is None or pairs.keys.shape[2] <= 4 * limit + 84


def test_state_select_repeats_and_drops_rows_everywhere():
    pairs = Pairs()
    pairs.append(torch.arange(3.0).view(3, 1, 1, 1), torch.arange(3.0).view(3, 1, 1, 1))
    pairs.select(torch.tensor([2, 2, 0]))
    assert pairs.keys.flatten().tolist() == pairs.values.flatten().tolist() == [2, 2, 0]
    pairs.repeat(2)
    assert pairs.keys.flatten().tolist() == [2, 2, 2, 2, 0, 0]


def test_layout_of_says_the_same_without_looking_at_the_tensors(monkeypatch):
    """What a graph is made of serves every input, so it can't depend on what is in the tensors."""
    draw = torch.Generator().manual_seed(0)
    compiling = torch.compiler.is_compiling
    for share, border in ((2.0, 0.0), (0.6, 0.0), (2.0, 0.4), (0.6, 0.4), (2.0, 2.0)):
        before, stored = [Rows(), Rows(torch.zeros(4, dtype=torch.long))], 0
        for time in (5, 1, 1, 7):
            mask = torch.rand(4, time, generator=draw) < share
            ids = (torch.rand(4, time, generator=draw) < border).cumsum(1) + stored
            ids = ids if border else None
            found = []
            for traced, rows in zip((False, True), before, strict=True):
                monkeypatch.setattr(torch.compiler, "is_compiling", lambda traced=traced: traced)
                layout, order, rows = Layout.of(4, time, mask, ids, rows, stored)
                monkeypatch.setattr(torch.compiler, "is_compiling", compiling)
                here = torch.arange(time).expand(4, time)
                real = torch.ones(4, time, dtype=torch.bool) if layout.is_padding is None else ~layout.is_padding
                tokens = torch.full((4,), stored + time) if rows.tokens is None else rows.tokens
                position = layout.position(here.device).expand(4, time)
                found.append([(here if order is None else order)[real], real, position[real], tokens])
                found[-1].append(torch.zeros(4) if rows.document is None else rows.document)
                before[int(traced)] = rows
            assert all(map(torch.equal, *found)), (share, border, time)
            stored += time
