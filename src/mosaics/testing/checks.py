"""Every check of the conformance suite. None knows a memory by name."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from mosaics.memories import Common, Context, Layout
from mosaics.memories.contract import build, linear_flops
from mosaics.models.configuration_mosaic import MosaicConfig
from mosaics.models.memory_file import load_memory, read_context, save_memory
from mosaics.models.modeling_mosaic import MosaicForCausalLM
from mosaics.testing.subject import VOCABULARY, WIDTH, Nonconforming, Subject

BOUND = 1e-9
LEAST_REACH = 3
GUESSING = 0.36  # of four words; 0.31 is what chance gives one in twenty times
CHECKS: dict[str, Callable[[Subject], None]] = {}


def check(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
    """Make a function one of the checks, under its name."""
    CHECKS[function.__name__] = function
    return function


def _ids(batch: int, time: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (batch, time), generator=torch.Generator().manual_seed(seed))


def _near(found: Tensor, expected: Tensor, what: str, bound: float = BOUND) -> None:
    found, expected = found.detach().double(), expected.detach().double()
    if found.shape != expected.shape:
        raise Nonconforming(f"{what}: the shape is {tuple(found.shape)} and not {tuple(expected.shape)}")
    size = expected.norm().item() or 1.0
    error = (found - expected).norm().item() / size
    if not error <= bound:
        raise Nonconforming(f"{what}: the relative difference is {error:.2e}, and {bound:.0e} is allowed")


def _grads(output: Tensor, model: nn.Module, seed: int = 5) -> Tensor:
    """Gradients of all parameters of a fixed random projection of the output."""
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad((output * weight.to(output.dtype)).sum(), parameters, allow_unused=True)
    zipped = zip(found, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zipped])


def _cut(model: MosaicForCausalLM, ids: Tensor, pieces: list[int], mask=None, documents=None) -> Tensor:
    """Logits of a sequence that is fed in pieces."""
    cache, begin, logits = DynamicCache(config=model.config), 0, []
    for piece in pieces:
        part = slice(begin, begin + piece)
        begin += piece
        output = model(
            ids[:, part],
            attention_mask=None if mask is None else mask[:, :begin],
            document_ids=None if documents is None else documents[:, part],
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def _random_pieces(time: int, draw: torch.Generator) -> list[int]:
    pieces = []
    while sum(pieces) < time:
        pieces.append(int(torch.randint(1, min(9, time - sum(pieces)) + 1, (), generator=draw)))
    return pieces


def _cut_anywhere(subject: Subject, kind: str, cuts: list[list[int]], layers: int = 2) -> None:
    model, ids = subject.model(kind, layers=layers), _ids(2, sum(cuts[0]))
    whole = model(ids, use_cache=False).logits
    expected = _grads(whole, model)
    for pieces in cuts:
        found = _cut(model, ids, pieces)
        _near(found, whole, f"{kind}, cut into {pieces}: logits")
        _near(_grads(found, model), expected, f"{kind}, cut into {pieces}: gradients", 1e-8)


@check
def any_cut_equals_the_whole(subject: Subject) -> None:
    """At the logits and in the gradients: pieces, then one token at a time."""
    pieces = [*_random_pieces(14, torch.Generator().manual_seed(1)), *[1] * 9]
    _cut_anywhere(subject, "alone", [pieces], layers=1)


@check
def any_cut_beside_others_equals_the_whole(subject: Subject) -> None:
    """The same beside other memories, and of two memories of the kind; also in one piece with a cache."""
    draw = torch.Generator().manual_seed(2)
    _cut_anywhere(subject, "beside", [[27], _random_pieces(27, draw)])
    _cut_anywhere(subject, "twice", [[13, 14]])


def _pack_and_pad(subject: Subject, kind: str, trial: int, time: int = 24) -> None:
    draw = torch.Generator().manual_seed(2 + trial)
    model = subject.model(kind)
    ids, pieces = _ids(3, time, trial), _random_pieces(time, draw)
    mask = torch.rand(3, time, generator=draw) < 0.7
    mask[1], mask[2] = torch.arange(time) >= 7, torch.arange(time) < time - 6
    documents = (torch.rand(3, time, generator=draw) < 0.15).cumsum(1) % 3
    whole = model(ids, mask, documents, use_cache=False).logits
    with torch.no_grad():
        cut = _cut(model, ids, pieces, mask.long(), documents)
    alone, where = [], []
    for row in range(3):
        real = mask[row].nonzero()[:, 0]
        borders = [i for i in range(1, len(real)) if documents[row, real[i]] != documents[row, real[i - 1]]]
        for begin, end in zip([0, *borders], [*borders, len(real)], strict=True):
            alone.append(ids[row, real[begin:end]])
            where += [(row, int(i)) for i in real[begin:end]]
    rows, columns = torch.tensor(where).T
    # Each document begins a row of its own: what stands behind it there changes nothing of it.
    lengths = torch.tensor([len(document) for document in alone])
    filled = nn.utils.rnn.pad_sequence(alone, batch_first=True, padding_value=1)
    expected = model(filled, use_cache=False).logits[torch.arange(filled.shape[1]) < lengths[:, None]]
    _near(whole[rows, columns], expected, f"{kind}, packed and padded: logits")
    _near(cut[rows, columns], expected, f"{kind}, packed, padded and cut into {pieces}: logits")
    if kind == "alone":
        _near(_grads(whole[rows, columns], model), _grads(expected, model), "packed and padded: gradients", 1e-8)


@check
def padding_and_documents_change_nothing(subject: Subject) -> None:
    """Rows of packed documents with padding anywhere, whole and in pieces: each document as if it were alone."""
    _pack_and_pad(subject, "alone", 0, time=20)


@check
def padding_and_documents_change_nothing_beside_others(subject: Subject) -> None:
    """The same beside other memories, and of two memories of the kind."""
    _pack_and_pad(subject, "beside", 1)
    _pack_and_pad(subject, "twice", 2)


@check
def nothing_comes_from_the_future(subject: Subject) -> None:
    """No gradient of an answer reaches a later token, through any input; and the memory does answer from earlier ones,
    or from the token itself."""
    made, time = subject.memory().double(), 14
    x, embeddings = (torch.randn(1, time, WIDTH, dtype=torch.float64).expand(time, -1, -1) for _ in range(2))
    x, embeddings = x.clone().requires_grad_(), embeddings.clone().requires_grad_()
    layout = Layout(time, time)
    y, _ = made(x, layout, None, Context(embeddings=embeddings, layout=layout))
    asked = y.diagonal().square().sum()  # of each row the answer at another token
    later, some = torch.ones(time, time, dtype=torch.bool).triu(1), False
    for g in torch.autograd.grad(asked, (x, embeddings), allow_unused=True):
        if g is not None:
            reached = (g != 0).any(-1)
            if (reached & later).any():
                at = (reached & later).any(1).nonzero()[0].item()
                raise Nonconforming(f"the answer at {at} depends on later tokens")
            some |= bool(reached.any())
    if not some:
        raise Nonconforming("the answers depend on no token at all")


@check
def it_answers_something(subject: Subject) -> None:
    """Its answers are finite, not all 0, and change with what is asked."""
    made = subject.memory().double()
    x = torch.randn(2, 12, WIDTH, dtype=torch.float64)
    y, _ = made(x, Layout(2, 12), None, Context(embeddings=x))
    if y.shape != x.shape or not torch.isfinite(y).all():
        raise Nonconforming(f"the answers have shape {tuple(y.shape)}, or are not finite")
    if not (y[:, -1] != 0).any() or torch.equal(y[0], y[1]):
        raise Nonconforming("the answers are 0, or the same for all inputs")


@check
def rows_can_be_selected_and_repeated(subject: Subject) -> None:
    """Beams: rows of a state are reordered, dropped and repeated, and go on as rows of their own."""
    model, ids = subject.model(), _ids(3, 19)
    rows = torch.tensor([2, 0, 0])
    for begin in (1, 8, 11):
        cache = model(ids[:, :begin], use_cache=True).past_key_values
        cache.batch_select_indices(rows)
        found = model(ids[rows, begin:], past_key_values=cache).logits
        _near(found, model(ids[rows], use_cache=False).logits[:, begin:], "rows selected")
        cache = model(ids[:, :begin], use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        twice = ids.repeat_interleave(2, dim=0)
        found = model(twice[:, begin:], past_key_values=cache).logits
        _near(found, model(twice, use_cache=False).logits[:, begin:], "rows repeated")


@check
def a_fixed_room_changes_nothing(subject: Subject) -> None:
    """A static cache gives what the growing one gives, with padding, documents and chosen rows, and no shape in it
    changes after the first call. A memory that can't keep to a room says so."""
    model, time = subject.model(), 23
    if (state := subject.memory().initial_state()) is not None:
        try:
            state.reserved(time)
        except ValueError:
            return
    ids, draw = _ids(3, time), torch.Generator().manual_seed(1)
    mask = torch.rand(3, time, generator=draw) < 0.7
    mask[0] = True
    mask[1, :7] = False  # a row without a token at first
    documents = (torch.rand(3, time, generator=draw) < 0.2).cumsum(1)
    for what, given in (
        ("whole rows", {}),
        ("padding", {"attention_mask": mask}),
        ("documents", {"document_ids": documents, "attention_mask": mask}),
    ):
        caches = [DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=time)]
        begin, shapes = 0, []
        for size in (5, 1, 1, 6, 1, 1, 1, 7):
            part = slice(begin, begin + size)
            with torch.no_grad():
                expected, found = (
                    model(ids[:, part], **{k: x[:, part] for k, x in given.items()}, past_key_values=cache).logits
                    for cache in caches
                )
            real = mask[:, part] if "attention_mask" in given else torch.ones_like(mask[:, part])
            _near(found[real], expected[real], f"{what}, positions {begin} to {begin + size}")
            states = [part for layer in caches[1].layers for state in layer.held() for part in state.parts()]
            shapes.append([x.shape for part in states for x in vars(part).values() if isinstance(x, Tensor)])
            if begin == 6:
                for cache in caches:
                    cache.batch_select_indices(torch.tensor([2, 0, 1]))
                ids, mask, documents = (x[[2, 0, 1]] for x in (ids, mask, documents))
                given = {k: {"attention_mask": mask, "document_ids": documents}[k] for k in given}
            begin += size
        if any(shape != shapes[0] for shape in shapes):
            raise Nonconforming(f"{what}: the shapes of a static state change: {shapes}")


@check
def beams_equal_those_without_a_cache(subject: Subject) -> None:
    model, ids = subject.model(), _ids(2, 5)
    options = dict(max_new_tokens=5, num_beams=3, do_sample=False, pad_token_id=0)
    if not torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options)):
        raise Nonconforming("beam search with the cache finds other tokens than without")


@check
def checkpointing_changes_nothing(subject: Subject) -> None:
    """Gradient checkpointing: the same loss and gradients, with dropout and auxiliary losses."""
    for kind in ("alone", "beside"):
        model, ids = subject.model(kind, dropout=0.2).train(), _ids(2, 21)
        found = []
        for _ in range(2):
            torch.manual_seed(5)
            loss = model(ids, labels=ids, draw=0.6).loss
            gradients = torch.autograd.grad(loss, [p for p in model.parameters()], allow_unused=True)
            found.append([loss, *(g for g in gradients if g is not None)])
            model.gradient_checkpointing_enable()
        if len(found[0]) != len(found[1]):
            raise Nonconforming(f"{kind}: other parameters have gradients when activations are checkpointed")
        for plain, again in zip(*found, strict=True):
            _near(again, plain, f"{kind}: loss or gradients when activations are checkpointed", 1e-12)


@check
def states_survive_a_file(subject: Subject) -> None:
    """What is remembered of a context is kept in a file, and goes on from there, at odd lengths: as what was kept does,
    and as the whole does; an inner loop that is chaotic over 300 tokens as far as rounding allows."""
    model = subject.model(layers=1)
    model.generation_config.pad_token_id = 0
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for time in (1, 9, 130, 300):
            context, path = _ids(1, time), Path(folder) / f"{time}.memory"
            kept, more = read_context(model, context, 97), _ids(1, 7, seed=1)
            save_memory(path, model, kept, context)
            cache, _ = load_memory(path, model)
            found, what = model(more, past_key_values=cache).logits, f"kept after {time} tokens"
            _near(found, model(more, past_key_values=kept).logits, f"{what} in a file", 1e-12)
            ids = torch.cat([context, more], dim=1)
            whole = model(ids, use_cache=False).logits[:, time:]
            try:
                _near(found, whole, what)
            except Nonconforming:
                if time < 300:
                    raise
                _near(found, whole, what, min(_rounding(model, ids, whole), 1e-6))


def _rounding(model: MosaicForCausalLM, ids: Tensor, expected: Tensor) -> float:
    """How far the last logits move when all embeddings do by parts in 1e15: where that is far, no two orders of the
    same sums agree better."""
    generator = torch.Generator().manual_seed(6)
    embedded = model.get_input_embeddings()(ids)
    moved = embedded * (1 + 1e-15 * torch.randn(embedded.shape, generator=generator, dtype=embedded.dtype))
    logits = model(inputs_embeds=moved, use_cache=False).logits[:, -expected.shape[1] :]
    return (logits - expected).norm().item() / expected.norm().item()


@check
def state_bytes_are_those_held(subject: Subject) -> None:
    """After room to grow into was let go of, in float32 and for one row."""
    made = subject.memory().float()
    for time in (1, 7, 40):
        state, x = made.initial_state(), torch.randn(1, time, WIDTH)
        for begin in range(0, time, 9):
            part = x[:, begin : begin + 9]
            layout = Layout(1, part.shape[1], stored=begin)
            with torch.no_grad():
                _, state = made(part, layout, state, Context(embeddings=part, layout=layout))
        held = 0
        if state is not None:
            for part in state.parts():
                part.release()
            state.map(lambda t: t.clone())  # counts what is held, not what a view looks at
            for part in state.parts():
                held += sum(v.numel() * v.element_size() for v in vars(part).values() if isinstance(v, Tensor))
        said = made.state_bytes(time, 4)
        if said != held:
            raise Nonconforming(f"after {time} tokens it holds {held} bytes and says {said}")


@check
def flops_of_linear_maps_are_torchs(subject: Subject) -> None:
    """The operations of linear maps are those that torch counts; all together are no fewer, never fall with the
    context, and are within a factor of 4 of the products that torch sees in a pass: it does not see compiled reads, and
    sees more than the equation where chunks make a scan faster."""
    from torch.utils.flop_counter import FlopCounterMode

    made, time = subject.memory().float(), 8
    maps = [m for m in made.modules() if isinstance(m, nn.Linear)]
    counted = 0
    for linear in maps:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            linear(torch.randn(1, time, linear.in_features))
        counted += counter.get_total_flops()
    if counted != linear_flops(made) * time:
        raise Nonconforming(f"its linear maps take {counted / time} operations a token, not {linear_flops(made)}")
    said = [made.flops(n) for n in (16, 32, 64, 1024)]
    if sorted(said) != said:
        raise Nonconforming(f"its operations a token fall with the context: {said}")
    if said[0] < linear_flops(made):
        raise Nonconforming(f"it says {said[0]} operations a token, fewer than its linear maps take")
    if subject.around:
        return  # what it wraps is counted where it stands
    x, layout = torch.randn(1, 32, WIDTH), Layout(1, 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made.eval()(x, layout, None, Context(embeddings=x, layout=layout))
    seen = counter.get_total_flops() / 32
    if not seen / 4 <= said[1] <= 4 * seen:
        raise Nonconforming(f"it says {said[1]} operations a token, and torch sees {seen:.0f}")


@check
def activation_bytes_are_about_right(subject: Subject) -> None:
    """Within a factor of 3 of what autograd keeps for a layer, without a compiler's help and beyond small sizes."""
    try:
        made = subject.memory(common=Common(64))
    except ValueError:
        return  # its sizes do not fit that width
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in made.parameters()}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    x = torch.randn(2, 128, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y, _ = made(x, Layout(2, 128), None, Context(embeddings=x, layout=Layout(2, 128), draw=0.5))
    found, said = sum(kept.values()) / 256, made.activation_bytes(4)
    del y
    if not found / 3 <= said <= 3 * found:
        raise Nonconforming(f"it keeps {found:.0f} bytes a token for the backward pass and says {said:.0f}")


@check
def initialisation_is_applied(subject: Subject) -> None:
    """By the constructor of a model and after the meta device: each parameter is set, as `reset_parameters` sets it."""

    def made(way: str) -> MosaicForCausalLM:
        torch.manual_seed(6)
        config = subject.config(layers=2)
        if way == "constructor":
            return MosaicForCausalLM(config)
        with torch.device("meta"):
            model = MosaicForCausalLM(config)
        model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        model.init_weights()
        return model

    @functools.cache
    def expected(common: Common, layer_index: int) -> dict[str, Tensor]:
        """Many draws of the memory's own say what to expect of each parameter."""
        draws: dict[str, list[Tensor]] = {}
        other = build(subject.type, dict(subject.options), common, layer_index)
        for seed in range(12):
            torch.manual_seed(100 + seed)
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.fill_(torch.nan)
                other.reset_parameters(layer_index)
            for name, parameter in other.named_parameters():
                draws.setdefault(name, []).append(parameter.detach().clone())
        return {name: torch.stack(drawn).double() for name, drawn in draws.items()}

    for way in ("constructor", "meta"):
        model = made(way)
        for memory in model.model.stack.memories():
            if memory.name == "inner" or memory.type != subject.type:
                continue
            draws = expected(memory.common, memory.layer_index)
            for name, parameter in memory.named_parameters():
                known = draws[name]
                if not torch.isfinite(known).all():
                    raise Nonconforming(f"reset_parameters does not set {name}")
                value = parameter.detach().double()
                size = max(known.square().mean().sqrt().item(), 1e-12)
                mean, spread = known.mean().item(), known.std().item() if known.numel() > 1 else 0.0
                slack = 6 * spread / value.numel() ** 0.5 + 1e-6 * size
                constant = bool((known == known[0]).all())
                wrong = not torch.equal(value, known[0]) if constant else abs(value.mean().item() - mean) > slack
                if not constant and value.numel() > 30:
                    ratio = value.std().item() / known.std(dim=tuple(range(1, known.dim()))).mean().item()
                    wrong |= abs(ratio - 1) > 6 / (2 * value.numel()) ** 0.5 + 0.02
                if wrong or not torch.isfinite(value).all():
                    raise Nonconforming(
                        f"{way}: {name} of block {memory.layer_index} is not as reset_parameters sets it"
                    )


@check
def lower_precision_works(subject: Subject) -> None:
    """bfloat16 parameters, and autocast: finite gradients, and logits near those of float32."""
    torch.manual_seed(7)
    exact = MosaicForCausalLM(subject.config()).eval()
    ids = _ids(2, 20)
    expected = exact(ids).logits
    narrow = copy.deepcopy(exact).bfloat16()
    for name, run in (
        ("bfloat16", lambda: narrow(ids, labels=ids)),
        ("autocast", lambda: exact(ids, labels=ids)),
    ):
        model = narrow if name == "bfloat16" else exact
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
            output = run()
        output.loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not all(torch.isfinite(g).all() for g in gradients):
            raise Nonconforming(f"{name}: a gradient is not finite")
        _near(output.logits, expected, f"{name}: logits", 0.08)
        cut = _cut(model.eval(), ids, [7, 1, 12]) if name == "bfloat16" else None
        if cut is not None:
            _near(cut, expected, f"{name}, cut: logits", 0.08)


@check
def small_inputs_work(subject: Subject) -> None:
    """No rows, one token, and a document for each token."""
    model = subject.model("beside", layers=1)
    if model(torch.empty(0, 5, dtype=torch.long)).logits.shape != (0, 5, VOCABULARY):
        raise Nonconforming("a batch without rows has no logits of its shape")
    one = _ids(2, 1)
    _near(_cut(model, one, [1]), model(one, use_cache=False).logits, "one token")
    ids = _ids(2, 5)
    alone = model(ids.view(10, 1), use_cache=False).logits.view(2, 5, -1)
    documents = torch.arange(5).expand(2, 5)
    _near(model(ids, document_ids=documents, use_cache=False).logits, alone, "a document for each token")
    _near(_cut(model, ids, [2, 1, 2], documents=documents), alone, "a document for each token, cut")


@check
@torch.no_grad()
def what_it_shows_is_what_it_did(subject: Subject) -> None:
    """Who looks changes nothing. Weights that are asked for in parts are those asked for together, none is of what a
    position may not read, and with the values they give what was read; with documents and padding. Numbers over time
    and shares are finite, one for each head or part and position."""
    model, ids = subject.model("beside", layers=1), _ids(2, 19)
    mask = torch.arange(19) < torch.tensor([[19], [13]])
    documents = torch.tensor([[0] * 7 + [1] * 12, [0] * 10 + [1] * 9])
    for given in ((ids,), (ids, mask, documents)):
        context = Context(reads=[])
        seen = model.model(*given, use_cache=False, context=context).last_hidden_state
        _near(seen, model.model(*given, use_cache=False).last_hidden_state, "looked at")
        real = mask if len(given) > 1 else torch.ones_like(mask)
        for read in context.reads:
            if read.memory != "tried":
                continue
            for name, x in (read.traces | read.maps).items():
                if x.dim() != 3 or x.shape[0] != 2 or x.shape[2 if name in read.traces else 1] != 19:
                    raise Nonconforming(f"what it shows as {name!r} has the shape {tuple(x.shape)}")
                if not x.isfinite().all():
                    raise Nonconforming(f"what it shows as {name!r} is not finite")
            if read.rows is None:
                continue
            weights = read.weights
            parts = [(read.rows(slice(b, b + 4)), b) for b in range(0, 19, 4)]
            for (part, first), begin in parts:
                whole = weights[:, :, begin : begin + 4]
                end = first + part.shape[-1]
                _near(part, whole[..., first:end], "weights in parts")
                if whole[..., :first].any() or whole[..., end:].any():
                    raise Nonconforming("weights in parts leave out what is read")
            if read.contextual and weights.triu(1).any():
                raise Nonconforming("what it shows was read of later positions")
            if read.span is not None:
                slots = torch.arange(read.slots)
                outside = (slots < read.span[0][..., None]) | (slots >= read.span[1][..., None])
                if (weights * (outside if outside.dim() == 2 else outside[:, None])).any():
                    raise Nonconforming("what it shows was read of pairs that it may not read")
            if read.values is not None:
                values = read.values.masked_fill(~read.values.isfinite(), 0.0)  # nobody has read the newest
                found = (weights @ values.to(weights.dtype)).transpose(1, 2)[real]
                _near(found, read.answer.transpose(1, 2)[real], "weights times values", 1e-8)


@check
def it_can_be_taken_out(subject: Subject) -> None:
    """Out of a model beside others: what is left is the model that never had it, also when saved and loaded; and so it
    is in one pass that leaves it out."""
    model, ids = subject.model("beside"), _ids(1, 12)
    left_out = model(ids, context=Context(without=frozenset({"tried"}))).logits
    steps = [[m for m in step if m.get("name") != "tried"] for step in subject.arrangement("beside")]
    blocks = [{"repeat": 2, "steps": steps}]  # without one around
    other = MosaicForCausalLM(MosaicConfig(blocks=blocks, vocab_size=VOCABULARY, hidden_size=WIDTH)).double().eval()
    model.remove_memories("tried")
    other.load_state_dict(model.state_dict())
    _near(model(ids).logits, other(ids).logits, "taken out")
    _near(left_out, model(ids).logits, "left out of a pass")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        _near(MosaicForCausalLM.from_pretrained(folder)(ids).logits, model(ids).logits, "taken out, saved and loaded")


@check
def training_resumes_bit_for_bit(subject: Subject) -> None:
    """Three steps, and the same three with everything saved and loaded after the first."""
    from mosaics.models.draws import draw_step

    ids = _ids(4, 24)

    def steps(model: MosaicForCausalLM, optimizer: torch.optim.Optimizer, numbers: Iterable[int]) -> None:
        model.train()
        for number in numbers:
            torch.manual_seed(number)
            model(ids, labels=ids, draw=draw_step(0, number)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def fresh() -> tuple[MosaicForCausalLM, torch.optim.Optimizer]:
        torch.manual_seed(8)
        model = MosaicForCausalLM(subject.config(dropout=0.1))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    whole, optimizer = fresh()
    steps(whole, optimizer, (1, 2, 3))
    begun, first = fresh()
    steps(begun, first, (1,))
    resumed, second = fresh()
    resumed.load_state_dict(copy.deepcopy(begun.state_dict()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(resumed, second, (2, 3))
    for name, value in whole.state_dict().items():
        if not torch.equal(value, resumed.state_dict()[name]):
            raise Nonconforming(f"{name} differs after a training that was resumed")


def _task(distance: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """A word of four among fillers, so many tokens before the end, where a question asks for it; and the words."""
    draw = torch.Generator().manual_seed(seed)
    time = distance + 3
    ids = torch.randint(6, VOCABULARY, (rows, time), generator=draw)
    answers = torch.randint(0, 4, (rows,), generator=draw)
    ids[:, -1 - distance], ids[:, -1] = answers, 5
    return ids, answers


def _recall(subject: Subject, distance: int) -> float:
    """The share of right answers of one block after a short training, twice as long where it is that of guessing."""
    torch.manual_seed(9)
    model, found = MosaicForCausalLM(subject.config(layers=1)), 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for step in range(1, 121):
        ids, answers = _task(distance, 64, step)
        nn.functional.cross_entropy(model.train()(ids, use_cache=False).logits[:, -1], answers).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 60 == 0:
            ids, answers = _task(distance, 400, 10**6)
            with torch.no_grad():
                right = model.eval()(ids, use_cache=False).logits[:, -1].argmax(-1) == answers
            if (found := right.double().mean().item()) > GUESSING:
                break
    return found


@check
def it_reaches_as_far_as_it_says(subject: Subject) -> None:
    """After a short training it recalls a word as far back as it says better than by guessing, and not one beyond the
    tokens that it says it never does. Who names no such limit names a distance beyond what its convolutions see."""
    near, far = subject.memory().reach()
    if far is None and near is not None and near < LEAST_REACH:
        raise Nonconforming(
            f"it names no limit and {near} tokens, where {LEAST_REACH} are the least that say something"
        )
    if near != 0:
        distance = 10 if near is None else near
        found = _recall(subject, distance)
        if found <= GUESSING:
            raise Nonconforming(f"a word {distance} tokens back is recalled in {found:.0%} of cases, as by guessing")
    if far is not None:
        found = _recall(subject, far + 8)
        if found > GUESSING:
            raise Nonconforming(f"a word {far + 8} tokens back is recalled ({found:.0%}), and its reach is {far}")
