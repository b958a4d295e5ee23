"""Every memory keeps the contract, and the suite that says so finds memories that do not."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from mosaics.memories import REGISTRY, Memory, Read, State, register
from mosaics.models import modeling_mosaic
from mosaics.testing import CHECKS, Nonconforming, check_examples, conform, examples

FIRST = list(examples(first=True))
MORE = [example for example in examples() if example not in FIRST]


QUICK = (
    "any_cut_equals_the_whole",
    "padding_and_documents_change_nothing",
    "nothing_comes_from_the_future",
    "it_answers_something",
    "state_bytes_are_those_held",
    "initialisation_is_applied",
    "small_inputs_work",
    "what_it_shows_is_what_it_did",
)


@pytest.mark.parametrize("name, options", FIRST, ids=[name for name, _ in FIRST])
def test_memory_conforms(name, options):
    conform(name, options, QUICK)


@pytest.mark.conform
@pytest.mark.parametrize("name, options", FIRST, ids=[name for name, _ in FIRST])
def test_memory_conforms_in_what_takes_longer(name, options):
    conform(name, options, [check for check in CHECKS if check not in QUICK])


@pytest.mark.conform
@pytest.mark.parametrize("name, options", MORE, ids=[f"{name}-{number}" for number, (name, _) in enumerate(MORE)])
def test_memory_conforms_with_other_options(name, options):
    conform(name, options)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_examples_try_every_option_with_two_values(name):
    check_examples(name)


@dataclasses.dataclass
class Last(State):
    """The last input of each row, `(batch, 1, d)`."""

    x: Tensor | None = None


class Neighbour(Memory):
    """Answers with a map of the token itself and the one before it: a short convolution, whose tail is its state."""

    EXAMPLES = ({}, {"scale": 0.5})

    @dataclasses.dataclass(frozen=True)
    class Options:
        scale: float = 1.0

    def __init__(self, options, common, layer_index):
        super().__init__(options, common, layer_index)
        self.proj = nn.Linear(2 * common.hidden_size, common.hidden_size, bias=common.bias)

    def initial_state(self):
        return Last()

    def forward(self, x, layout, state, context):
        last = torch.zeros_like(x[:, :1]) if state is None or state.x is None else state.x
        whole = torch.cat([last, x], dim=1)
        before = self.before(whole[:, :-1], layout)
        if state is not None:
            state.x = self.tail(whole, layout)
        return self.proj(torch.cat([before, x], dim=2)) * self.options.scale, state

    def before(self, before, layout):
        return before if layout.is_first is None else before.masked_fill(layout.is_first[..., None], 0.0)

    def tail(self, whole, layout):
        return layout.align(whole[:, None])[:, 0, -1:]

    def reset_parameters(self, layer_index):
        nn.init.normal_(self.proj.weight, std=0.3 / (layer_index + 1))

    def flops(self, context_length):
        return 2 * self.proj.weight.numel()

    def reach(self):
        return 1, 1

    def state_bytes(self, context_length, element_size):
        return element_size * self.common.hidden_size if context_length else 0


class Zeros(Neighbour):
    def forward(self, x, layout, state, context):
        y, state = super().forward(x, layout, state, context)
        return 0 * y, state


class Peek(Neighbour):
    def before(self, before, layout):
        return torch.cat([before[:, 2:], torch.zeros_like(before[:, :2])], dim=1)


class Forgetful(Neighbour):
    def tail(self, whole, layout):
        return torch.zeros_like(whole[:, :1])


class Padded(Neighbour):
    def tail(self, whole, layout):
        return whole[:, -1:]


class AcrossDocuments(Neighbour):
    def before(self, before, layout):
        return before


class Unset(Neighbour):
    def reset_parameters(self, layer_index):
        """Nothing."""


class Boastful(Neighbour):
    def reach(self):
        return 4, 4


class Coy(Neighbour):
    def reach(self):
        return 1, None


class Modest(Neighbour):
    def flops(self, context_length):
        return -1

    def state_bytes(self, context_length, element_size):
        return 1


class Idle(Neighbour):
    """Half of what its map takes."""

    def flops(self, context_length):
        return self.proj.weight.numel()


class Busy(Neighbour):
    def flops(self, context_length):
        return 1e30


class Noisy(Neighbour):
    """Draws numbers of its own in training."""

    def forward(self, x, layout, state, context):
        y, state = super().forward(x, layout, state, context)
        return y * torch.rand((), generator=GENERATOR), state


class Hoarder(Neighbour):
    """Keeps more than it declares to."""

    def forward(self, x, layout, state, context):
        kept = state.x if state is not None else None
        if kept is not None:
            state.x = kept[:, -1:]
        y, state = super().forward(x, layout, state, context)
        if kept is not None:
            state.x = torch.cat([kept, state.x], dim=1)
        return y, state


GENERATOR = torch.Generator()


class Carried(Neighbour):
    """Leaves something in the stream in each pass, so that a block that is computed anew finds another."""

    def forward(self, x, layout, state, context):
        y, state = super().forward(x, layout, state, context)
        seen = context.stream.setdefault("seen", [])
        seen.append(1)
        return y * len(seen), state


class Show(Neighbour):
    """Shows that it reads the token before, or, wrongly, its own, or another weight, or what is no number."""

    def forward(self, x, layout, state, context):
        y, state = super().forward(x, layout, state, context)
        if context.reads is not None:
            time = x.shape[1]
            weights = torch.eye(time, dtype=x.dtype).roll(-1, 1)
            weights[0, -1] = 0.0
            values, whole = x[:, None], weights.expand(x.shape[0], 1, time, time)
            if layout.is_first is not None:
                whole = whole.masked_fill(layout.is_first[:, None, :, None], 0.0)
            shown = dict(values=values, answer=whole @ values, traces={"size": x.norm(dim=-1)[:, None]})
            shown |= {"rows": lambda positions: (whole[:, :, positions], 0), "slots": time} | self.wrong(whole, values)
            context.reads.append(Read(self.name, self.layer_index, **shown))
        return y, state

    def wrong(self, weights, values):
        return {}


class Later(Show):
    def wrong(self, weights, values):
        return {"rows": lambda positions: (weights.mT[:, :, positions], 0), "answer": weights.mT @ values}


class Halved(Show):
    def wrong(self, weights, values):
        return {"rows": lambda positions: (weights[:, :, positions] / 2, 0)}


class Ahead(Show):
    def wrong(self, weights, values):
        return {"rows": lambda positions: (weights[:, :, : weights[:, :, positions].shape[2]], 0)}


class NoNumber(Show):
    def wrong(self, weights, values):
        return {"traces": {"size": values.sum(-1) / 0}}


class Meddling(Neighbour):
    """Answers otherwise when it is looked at."""

    def forward(self, x, layout, state, context):
        y, state = super().forward(x, layout, state, context)
        return y * (1 if context.reads is None else 2), state


PLANTED = {
    **{kind: ("what_it_shows_is_what_it_did",) for kind in (Later, Halved, Ahead, NoNumber, Meddling)},
    Zeros: ("it_answers_something",),
    Peek: ("nothing_comes_from_the_future",),
    Forgetful: ("any_cut_equals_the_whole", "states_survive_a_file", "rows_can_be_selected_and_repeated"),
    Padded: ("padding_and_documents_change_nothing",),
    AcrossDocuments: ("padding_and_documents_change_nothing", "small_inputs_work"),
    Unset: ("initialisation_is_applied",),
    **{kind: ("it_reaches_as_far_as_it_says",) for kind in (Boastful, Coy)},
    **{kind: ("flops_of_linear_maps_are_torchs",) for kind in (Idle, Busy)},
    Modest: ("flops_of_linear_maps_are_torchs", "state_bytes_are_those_held"),
    Noisy: ("training_resumes_bit_for_bit", "checkpointing_changes_nothing"),
    Hoarder: ("a_fixed_room_changes_nothing",),
    Carried: ("checkpointing_changes_nothing",),
}


@pytest.fixture
def planted():
    known = dict(REGISTRY)
    yield lambda memory: register("planted")(type("Planted", (memory,), {}))
    REGISTRY.clear()
    REGISTRY.update(known)


def test_suite_takes_a_memory_that_keeps_the_contract(planted):
    planted(Neighbour)
    check_examples("planted")
    conform("planted", {"scale": 0.5})


def test_suite_takes_a_memory_that_shows_what_it_did(planted):
    planted(Show)
    conform("planted", {}, ["what_it_shows_is_what_it_did"])


@pytest.mark.parametrize("memory, check", [(m, check) for m, checks in PLANTED.items() for check in checks])
def test_suite_finds_a_memory_that_does_not(memory, check, planted):
    planted(memory)
    with pytest.raises(Nonconforming):
        conform("planted", {}, [check])


def test_suite_finds_a_model_that_does_not_initialise_a_memory(planted, monkeypatch):
    planted(Neighbour)
    monkeypatch.setattr(modeling_mosaic, "_reset_missing", lambda memory: None)
    with pytest.raises(Nonconforming, match="is not as reset_parameters sets it"):
        conform("planted", {}, ["initialisation_is_applied"])


def test_suite_asks_for_two_values_of_every_option(planted):
    planted(type("OneExample", (Neighbour,), {"EXAMPLES": ({},)}))
    with pytest.raises(Nonconforming, match="'scale'"):
        check_examples("planted")
    with pytest.raises(Nonconforming, match="'scale'"):
        conform("planted", {})


def test_suite_refuses_a_check_that_is_none(planted):
    planted(Neighbour)
    with pytest.raises(ValueError, match="choose from"):
        conform("planted", {}, ["no_such_check"])
    assert len(CHECKS) > 15
