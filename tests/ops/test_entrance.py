"""What comes into an op is checked once, for all forms alike, before any of them reads it."""

import copy

import pytest
import torch
import torch.nn.attention.flex_attention as flex_attention
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers import relative_error, tiny_model, tokens
from mosaics.ops import kernel_regression as read
from mosaics.ops import leaky_average as leaky
from mosaics.ops import unit_values as unit
from mosaics.ops.kernel_regression import Bandwidth, Narrow, Reach

OPS = {
    "kernel_regression": (read.kernel_regression, read.FORMS),
    "weights": (read.weights, {}),
    "leaky_average": (leaky.leaky_average, leaky.FORMS),
    "unit_values": (unit.unit_values, unit.FORMS),
}
FORMS = [(op, form) for op, (_, forms) in OPS.items() for form in (None, *forms)]


@pytest.fixture(autouse=True, scope="module")
def _flex_on_a_processor():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        yield


def arguments(op, time=6, stored=4):
    """What every form takes, by name."""
    torch.manual_seed(0)
    slots, bandwidth = stored + time, dict(zip(Bandwidth._fields, torch.rand(3, 2) + 0.5, strict=True))
    if op == "leaky_average":
        own = dict(inputs=torch.randn(3, 2, time, 5), gate=torch.randn(3, 2, time), decay=-torch.rand(3, 2, time))
        return own | dict(direction=torch.randn(3, 2, 5), log_scale=torch.randn(3, 2))
    if op == "unit_values":
        return dict(raw=torch.randn(3, 2, time, 5), mix=torch.rand(2), length=torch.rand(2))
    pairs = dict(queries=torch.randn(3, 2, time, 5), keys=torch.randn(3, 2, slots, 5))
    values = dict(values=torch.randn(3, 2, slots, 4)) if op == "kernel_regression" else {}
    start = torch.zeros(3, time, dtype=torch.int64)
    return pairs | values | bandwidth | dict(start=start, delay=1)


def ask(op, form, given):
    function, given = OPS[op][0], dict(given)
    options = {} if op == "weights" else dict(form=form)
    if op == "leaky_average":
        state = leaky.LeakyAverageState(given.pop("direction"), given.pop("log_scale"))
        return function(*given.values(), state, **options)[0]
    if op == "unit_values":
        return function(*given.values(), **options)
    bandwidth = Bandwidth(*(given.pop(name) for name in Bandwidth._fields))
    tensors = [given.pop(name) for name in ("queries", "keys", "values") if name in given]
    reach = Reach(**{name: given.pop(name) for name in Reach._fields if name in given})
    return function(*tensors, bandwidth, reach, **given, **options)


WRONG = {
    "fewer of the first dimension": lambda x: x[:1],
    "more of the first dimension": lambda x: torch.cat([x, x]),
    "fewer of the last dimension": lambda x: x[..., :1],
    "more of the last dimension": lambda x: torch.cat([x, x], -1),
    "fewer heads": lambda x: x[:, :1] if x.dim() > 2 else None,
    "fewer positions": lambda x: x[:, :, :-1] if x.dim() > 2 else None,
    "a dimension more": lambda x: x[None],
    "a dimension less": lambda x: x[0],
    "complex": lambda x: x.to(torch.complex64),
    "boolean": lambda x: x.bool(),
    "integers": lambda x: x.int() if x.is_floating_point() else x.float(),
    "another device": lambda x: x.to("meta"),
}
# What an argument decides alone.
FREE = {
    ("kernel_regression", "values"): ["last dimension"],
    ("weights", "keys"): ["positions"],
    ("unit_values", "raw"): ["first dimension", "positions", "last dimension"],
}


def spoilt(op):
    """Arguments with one that is wrong, and what is wrong."""
    for name, x in arguments(op).items():
        for what, change in WRONG.items():
            free = any(what.endswith(end) for end in FREE.get((op, name), ()))
            if isinstance(x, torch.Tensor) and not free and (changed := change(x)) is not None:
                yield f"{name}: {what}", arguments(op) | {name: changed}


@pytest.mark.parametrize("op", OPS)
def test_every_form_refuses_what_is_misshapen_or_of_another_kind_in_the_same_sentence(op):
    tried = set()
    for what, given in spoilt(op):
        said = set()
        for form in (None, *OPS[op][1]):
            with pytest.raises(ValueError, match=r"got .* (to be|give)") as caught:
                ask(op, form, copy.copy(given))
            said.add(str(caught.value))
        assert len(said) == 1, (what, said)
        tried.add(what.split(":")[0])
    assert tried == {name for name, x in arguments(op).items() if isinstance(x, torch.Tensor)}


NARROW = {
    "scales of another shape": lambda x: x._replace(scale=x.scale[..., 0]),
    "scales of fewer slots": lambda x: x._replace(scale=x.scale[:, :, 1:]),
    "scales in another dtype": lambda x: x._replace(scale=x.scale.bfloat16()),
    "data in another dtype": lambda x: x._replace(data=x.data.int()),
    "fewer slots": lambda x: Narrow(x.data[:, :, 1:], x.scale[:, :, 1:], x.dtype),
    "fewer rows": lambda x: Narrow(x.data[:1], x.scale[:1], x.dtype),
}


@pytest.mark.parametrize("what", NARROW)
@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize("time", [1, 6])
def test_kernel_regression_refuses_narrow_pairs_that_are_misshapen(what, name, time):
    given = arguments("kernel_regression", time)
    given |= {x: Narrow.of(given[x], torch.int8) for x in ("keys", "values")}
    ask("kernel_regression", None, given)
    for form in (None, *read.FORMS):
        with pytest.raises(ValueError, match="got .* to be"):
            ask("kernel_regression", form, given | {name: NARROW[what](given[name])})


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(slope=None), "both or none"),
        (dict(exponent=None), "both or none"),
        (dict(queries=torch.randn(3, 2, 20, 5), start=None), "10 pairs for 20 positions"),
        (dict(delay=-1), "delay of 0 or more"),
        (dict(delay=None), "no positions"),
        (dict(delay=None, start=None, window=3), "no positions"),
        (dict(delay=1.5), "give whole numbers"),
        (dict(window=5.0), "give whole numbers"),
        (dict(window=0), "window of 1 or more"),
        (dict(delay=2**64 + 1), "give whole numbers"),
        (dict(window=2**70), "give whole numbers"),
    ],
)
@pytest.mark.parametrize("op, form", [(op, form) for op, form in FORMS if op in ("kernel_regression", "weights")])
def test_kernel_regression_refuses_a_read_that_is_none(op, form, given, message):
    with pytest.raises(ValueError, match=message):
        ask(op, form, arguments(op) | given)


@pytest.mark.parametrize("form", [None, *read.FORMS])
@pytest.mark.parametrize("dropout", [-0.1, 1.0, 2.0, float("nan")])
def test_kernel_regression_refuses_a_dropout_that_is_no_probability_below_1(form, dropout):
    with pytest.raises(ValueError, match=f"dropout is {dropout}; give"):
        ask("kernel_regression", form, arguments("kernel_regression") | dict(dropout=dropout))


def answers(op, form, given):
    """What a form says, or None if it does not serve this."""
    try:
        return ask(op, form, given)
    except ValueError as error:
        assert "form" in str(error) or "Triton" in str(error), error
        return None


@torch.no_grad()
@pytest.mark.parametrize("form", [None, *read.FORMS])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
@pytest.mark.parametrize("time, stored", [(1, 9), (30, 0), (30, 9)])
def test_kernel_regression_takes_starts_of_any_integers(form, dtype, time, stored):
    given = arguments("kernel_regression", time, stored)
    given["start"] = torch.where(torch.arange(time) >= 10, 10, 0).expand(3, time)
    expected = answers("kernel_regression", "naive", given)
    found = answers("kernel_regression", form, given | dict(start=given["start"].to(dtype)))
    assert found is None or relative_error(found, expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("form", [form for form in read.FORMS if form != "naive"])
def test_kernel_regression_counts_what_begins_before_the_first_pair_from_that_pair(form):
    for time, stored in ((1, 9), (30, 0), (30, 9)):
        given = arguments("kernel_regression", time, stored) | dict(start=torch.full((3, time), -20))
        found, expected = (answers("kernel_regression", f, given) for f in (form, "naive"))
        assert found is None or relative_error(found, expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("op, form", [(op, form) for op, form in FORMS if form != "naive" and op != "weights"])
def test_every_form_takes_arguments_of_different_precision(op, form):
    """Computed in float32 or in float64 as the first argument is, and answered in the dtype of what is answered."""
    names = [name for name, x in arguments(op).items() if isinstance(x, torch.Tensor) and x.is_floating_point()]
    for time in (1, 6):
        for first in (torch.float32, torch.float64):
            for name in names:
                for other in (torch.float64, torch.bfloat16, torch.float16):
                    given = arguments(op, time)
                    given |= {n: given[n].to(first) for n in names}
                    given |= {name: given[name].to(other)}
                    found, expected = (answers(op, f, given) for f in (form, "naive"))
                    if found is not None:
                        assert found.dtype == expected.dtype and found.shape == expected.shape
                        assert relative_error(found, expected) < (1e-2 if found.dtype.itemsize == 2 else 1e-5), name


EMPTY = {
    "kernel_regression": {
        "rows": dict(batch=0), "heads": dict(heads=0), "positions": dict(time=0), "both": dict(time=0, stored=0),
        "width": dict(width=0), "value width": dict(value_width=0), "pairs": dict(stored=0, delay=None),
    },
    "leaky_average": {"rows": dict(batch=0), "heads": dict(heads=0), "width": dict(width=0)},
    "unit_values": {"rows": dict(batch=0), "heads": dict(heads=0), "width": dict(width=0), "positions": dict(time=0)},
}  # fmt: skip


@pytest.mark.parametrize("op, what", [(op, what) for op, cases in EMPTY.items() for what in cases])
def test_every_form_answers_where_there_is_nothing(op, what):
    s = dict(batch=2, heads=2, time=3, width=4, value_width=3, stored=5, delay=1) | EMPTY[op][what]
    lines = s["batch"], s["heads"]
    for form in (None, *OPS[op][1]):
        if op == "kernel_regression":
            slots = s["stored"] + (0 if s["delay"] is None else s["time"])
            sizes = dict(queries=(s["time"], s["width"]), keys=(slots, s["width"]), values=(slots, s["value_width"]))
            given = {name: torch.randn(*lines, *size) for name, size in sizes.items()}
            given |= dict(base=torch.ones(s["heads"]), slope=None, exponent=None, delay=s["delay"])
        elif op == "leaky_average":
            given = dict(inputs=torch.randn(*lines, 3, s["width"]), gate=torch.zeros(*lines, 3))
            given |= dict(decay=torch.zeros(*lines, 3), direction=torch.zeros(*lines, s["width"]))
            given |= dict(log_scale=torch.zeros(lines))
        else:
            given = dict(raw=torch.randn(*lines, s["time"], s["width"]))
            given |= {name: torch.ones(s["heads"]) for name in ("mix", "length")}
        found, expected = (answers(op, f, given) for f in (form, "naive"))
        assert found is None or (found.shape == expected.shape and torch.allclose(found, expected))


@pytest.mark.parametrize("op, form", FORMS)
@pytest.mark.parametrize("time", [1, 6])
def test_no_form_reads_memory_of_tensors_without_numbers(op, form, time):
    """Those of `FakeTensorMode` have no memory; some forms then say that they need numbers."""
    expected = ask(op, None, arguments(op, time)).shape
    with FakeTensorMode() as mode:
        given = {k: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for k, x in arguments(op, time).items()}
        try:
            assert ask(op, form, given).shape == expected
        except (ValueError, RuntimeError):
            assert form not in (None, "naive")
    real = arguments(op, time)
    with FakeTensorMode(allow_non_fake_inputs=True):  # what is made on the way has none
        try:
            ask(op, form, real)
        except (ValueError, RuntimeError):
            pass


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("time", [1, 6])
def test_every_op_runs_on_the_meta_device(op, time):
    given = {k: x.to("meta") if isinstance(x, torch.Tensor) else x for k, x in arguments(op, time).items()}
    found = ask(op, None, given)
    assert found.is_meta and found.shape == ask(op, None, arguments(op, time)).shape


def test_model_runs_on_the_meta_device_and_can_be_exported():
    ids, model = tokens(2, 30), tiny_model()
    expected = model(ids, use_cache=False).logits
    exported = torch.export.export(model, (ids,), kwargs=dict(use_cache=False), strict=False)
    assert relative_error(exported.module()(ids, use_cache=False).logits, expected) < 1e-9
    assert model.to("meta")(ids.to("meta")).logits.shape == expected.shape
