"""A set has the tokens that are routed to it, however rows are cut, packed and padded."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import relative_error
from mosaics.memories import Layout
from mosaics.memories.fast_weights.common import ShortConvolution


def looped(ids, mask, chosen):
    """For each row and set its tokens in order: document, place among the document's tokens in the set, position."""
    found = []
    for row_ids, row_mask, row_chosen in zip(ids.tolist(), mask.tolist(), chosen.tolist(), strict=True):
        sets = []
        for held in row_chosen:
            document, number, before, line = -1, 0, None, []
            for at, (i, real, own) in enumerate(zip(row_ids, row_mask, held, strict=True)):
                if real and (before is None or i != before):
                    document, number, before = document + 1, 0, i
                if real and own:
                    line.append((document, number, at))
                    number += 1
            sets.append(line)
        found.append(sets)
    return found


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_subsets_of_any_call_are_those_of_the_whole(data):
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    batch, sets, time = 3, 2, data.draw(st.integers(1, 25))
    ids = (torch.rand(batch, time, generator=draw) < data.draw(st.sampled_from([0.0, 0.2]))).cumsum(1)
    mask = torch.rand(batch, time, generator=draw) < data.draw(st.sampled_from([0.6, 1.1]))
    chosen = torch.rand(batch, sets, time, generator=draw) < data.draw(st.sampled_from([0.0, 0.3, 1.1]))
    expected = looped(ids, mask, chosen)
    x = torch.randn(batch, time, 2, 2, generator=draw)
    rows, tokens, begin = None, None, 0
    while begin < time:
        piece = data.draw(st.integers(1, time - begin))
        part = slice(begin, begin + piece)
        layout, order, rows = Layout.of(batch, piece, mask[:, part], ids[:, part], rows, begin)
        order = torch.arange(piece).expand(batch, piece) if order is None else order
        held = chosen[:, :, part].gather(2, order[:, None].expand(-1, sets, -1))
        given_x = x[:, part].gather(1, order[..., None, None].expand(-1, -1, 2, 2))
        subset = layout.subset(held, tokens)
        tokens, inner = subset.tokens, subset.layout
        gathered = subset.gather(given_x)
        assert gathered.shape == (batch, sets, inner.time, 2, 2) and inner.batch == batch * sets
        assert inner.time == max(1, int(inner.length.max())) and inner.stored == begin
        places = inner.position(x.device).expand(batch * sets, -1).unflatten(0, (batch, sets))
        which = torch.arange(sets).expand(batch, piece, sets)
        back = subset.at(gathered, which)
        for row in range(batch):
            for one in range(sets):
                own = [t for t in expected[row][one] if begin <= t[2] < begin + piece]
                assert int(inner.length.view(batch, sets)[row, one]) == len(own)
                assert (gathered[row, one, len(own) :] == 0).all()
                for i, (_, number, at) in enumerate(own):
                    assert torch.equal(gathered[row, one, i], x[row, at])
                    assert int(places[row, one, i]) == number
                    here = int((order[row] == at - begin).nonzero())
                    assert torch.equal(back[row, here, one], x[row, at])
        begin += piece


def test_subset_of_plain_rows_has_no_borders():
    subset = Layout(2, 3).subset(torch.tensor([[[1, 0, 1]], [[0, 0, 1]]]).bool())
    assert subset.layout.start is None and subset.layout.length.tolist() == [2, 1]
    assert subset.source.tolist() == [[[0, 2]], [[2, 3]]] and subset.tokens.tolist() == [[2], [1]]
    later = Layout(2, 2, stored=3).subset(torch.tensor([[[0, 0]], [[0, 1]]]).bool(), subset.tokens)
    assert later.layout.start.tolist() == [[-2], [-1]] and later.tokens.tolist() == [[2], [2]]
    empty = Layout(0, 2).subset(torch.zeros(0, 3, 2, dtype=torch.bool))
    assert empty.layout.batch == 0 and empty.gather(torch.ones(0, 2, 5)).shape == (0, 3, 1, 5)


def test_subset_of_a_document_that_a_set_has_not_met_begins_there():
    """The set's last tokens are of the document before, and of this one it has none until the third call."""
    chosen = torch.tensor([[[True, True]]])
    first, _, rows = Layout.of(1, 2, document_ids=torch.tensor([[0, 0]]))
    one = first.subset(chosen)
    second, _, rows = Layout.of(1, 2, document_ids=torch.tensor([[0, 1]]), rows=rows, stored=2)
    two = second.subset(torch.tensor([[[True, False]]]), one.tokens)
    third, _, rows = Layout.of(1, 2, rows=rows, stored=4)
    three = third.subset(chosen, two.tokens)
    assert (one.tokens.item(), two.tokens.item(), three.tokens.item()) == (2, 0, 2)
    assert two.layout.start.tolist() == [[-2]] and three.layout.start.tolist() == [[0, 0]]
    assert third.start.tolist() == [[-1, -1]]


def test_subset_gradients_and_convolutions_are_those_of_each_document_alone():
    layout, _, _ = Layout.of(2, 9, document_ids=torch.tensor([[0] * 4 + [1] * 5, [0] * 9]))
    chosen = torch.rand(2, 2, 9) < 0.6
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    convolution = ShortConvolution(3, 3).double()
    convolution.reset_parameters()
    subset = layout.subset(chosen)
    answer, tail = convolution(subset.gather(x).flatten(0, 1), subset.layout, None)
    found = subset.at(answer.unflatten(0, (2, 2)), torch.arange(2).expand(2, 9, 2)) * chosen.transpose(1, 2)[..., None]
    expected = torch.zeros_like(found)
    for row, borders in ((0, [0, 4, 9]), (1, [0, 9])):
        for one in range(2):
            for begin, end in zip(borders, borders[1:], strict=False):
                own = [t for t in range(begin, end) if chosen[row, one, t]]
                if own:
                    alone, _ = convolution(x[row : row + 1, own], Layout(1, len(own)), None)
                    place = torch.zeros(9, len(own), dtype=torch.float64)
                    place[own, range(len(own))] = 1.0
                    mark = torch.zeros(2, 9, 2, 1, dtype=torch.float64)
                    mark[row, :, one] = 1.0
                    expected = expected + mark * (place @ alone[0])[None, :, None]
    assert relative_error(found, expected) < 1e-12
    weight = torch.randn_like(found)
    both = (torch.autograd.grad((weight * y).sum(), x, retain_graph=True)[0] for y in (found, expected))
    assert relative_error(*both) < 1e-12
