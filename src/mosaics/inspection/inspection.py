"""What the memories of a mosaic retrieved for every token of a text, and what it was worth."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mosaics.memories import Context, Read

BLOCK = 128  # positions whose weights are held at once
PART = 64  # weights in which the largest are looked for together
PIECE = 1024  # positions whose logits are held at once
LOOKED_AT = 2048  # positions whose distances and repeats are made from weights that are written out, about
NEAR = 64  # tokens back that count as near where no memory of the model has a window
HELD = 4  # tokens kept of what an average holds
LEAST = 0.005  # share of an average from which on a token is kept
LIKELIEST = 5  # next tokens of a forecast


class Forecasts(NamedTuple):
    """What a model expected after every token.

    Attributes:
        tokens: `(time, 5)`, the likeliest next tokens, the likeliest first.
        log_probs: `(time, 5)`, their logarithmic probabilities in nats.
        of_next: `(time,)`, that of the token which came next; NaN after the last.
    """

    tokens: Tensor
    log_probs: Tensor
    of_next: Tensor


class HeadNumbers(NamedTuple):
    """How a head reads, on average over the positions that have something to read.

    Attributes:
        near: share read within `Inspection.near` tokens; NaN for pairs that are no positions.
        evenness: the effective number of pairs read over the number of pairs that could be; 1 is an even spread.
        repeats: where the current token has occurred before among the pairs, the share read at these occurrences, or at
            what followed them, whichever is more; NaN where none has.
        repeats_by_chance: what an even spread would read there.
        distance: how far back, in tokens, weighted; NaN as `near`.
        kind: `"persistent"`, `"induction-like"`, `"uniform"`, `"recent"`, `"document-wide"` or `"silent"`.
    """

    near: float
    evenness: float
    repeats: float
    repeats_by_chance: float
    distance: float
    kind: str


@dataclass(frozen=True)
class MemoryReads:
    """What one memory read of its pairs. Entry t of a dimension of time is what it did after token t.

    Attributes:
        memory: its name in the block.
        layer_index: the block's index, from 0.
        contextual: whether the pairs are positions of the context, and not pairs that training filled.
        found: `(heads, time, top)`, the pairs with the largest weights, the largest first: positions, those of the
            context before the text counted, or numbers of learned pairs; -1 where there are fewer.
        weights: `(heads, time, top)`, 0 where there is none.
        effects: `(heads, time, top)`, direct effects on the logit of the token that came next; NaN where the memory
            does not say how its answer reaches the output, and after the last token.
        head_effects: `(heads, time)`, the same of all pairs of a head together.
        effective: `(heads, time)`, the effective number of pairs read, the exponential of the entropy; 0 if none.
        near: `(heads, time)`, the share read within `Inspection.near` tokens.
        total: `(heads, time)`, the share read of these pairs: 1, but where there are none or other stores are read too.
        pairs: `(time,)`, how many could be read.
        residual: `(heads, time)`, as in `Read`, or None.
        numbers: of each head.
    """

    memory: str
    layer_index: int
    contextual: bool
    found: Tensor
    weights: Tensor
    effects: Tensor
    head_effects: Tensor
    effective: Tensor
    near: Tensor
    total: Tensor
    pairs: Tensor
    residual: Tensor | None
    numbers: list[HeadNumbers]


@dataclass(frozen=True)
class Shown:
    """What else a memory declares: `traces` `(heads, time)` and `maps` `(time, columns)` by name."""

    memory: str
    layer_index: int
    traces: dict[str, Tensor]
    maps: dict[str, Tensor]


@dataclass(frozen=True)
class Average:
    """What the leaky average behind the keys of a memory holds after each token of the text.

    Attributes:
        memory: its name in the block.
        layer_index: the block's index, from 0.
        found: `(heads, time, 4)`, the positions that weigh most in it, the heaviest first, those of the context before
            the text counted; -1 where there are fewer, or they have less than 0.5 %.
        shares: `(heads, time, 4)`, of the weights of all tokens of the text, gates times decays; 0 where there is none.
            What a context before the text left is not counted.
    """

    memory: str
    layer_index: int
    found: Tensor
    shares: Tensor


@dataclass(frozen=True)
class Inspection:
    """What a mosaic did with a text. Entry t of a dimension of time is what it did after reading token t, which is to
    expect token t + 1.

    Attributes:
        ids: `(time,)`, the tokens.
        context_ids: `(context,)`, the tokens that were read before; -1 where they are not known.
        near: how many tokens back count as near: the largest window of the model's memories.
        forecasts: of the whole model.
        without: by the name of a memory, of the model without it in all layers (the ablation of Memory Mosaics v2,
            Tables 2, 9 and 10; what was read before the text stays as it is).
        effects: `(time,)` by (block, memory), the direct effect of what a memory adds to the residual stream on the
            logit of the token that came next, the final norm frozen; `(None, "embedding")` and `(None, "bias")` beside,
            so that all sum to that logit. NaN after the last token. Empty with a memory around the blocks.
        reads: of every memory that shows pairs, in their order; not of blocks with a memory around them, which see
            other positions than those of the text.
        shown: of every memory that declares traces or maps.
        averages: of every memory whose keys are leaky averages.
    """

    ids: Tensor
    context_ids: Tensor
    near: int
    forecasts: Forecasts
    without: dict[str, Forecasts]
    effects: dict[tuple[int | None, str], Tensor]
    reads: list[MemoryReads]
    shown: list[Shown]
    averages: list[Average]

    def gain(self, name: str) -> Tensor:
        """`(time,)`: by how many nats the token that came next is likelier with a memory than without it."""
        return self.forecasts.of_next - self.without[name].of_next


@torch.no_grad()
def inspect(
    model: Any,
    input_ids: Tensor,
    past_key_values: Any = None,
    context_ids: Tensor | None = None,
    top: int = 4,
    told: Callable[[str], None] | None = None,
) -> Inspection:
    """Look into a mosaic while it reads a text. What is held grows with the length of the text, not with its square.

    Args:
        model: a `MosaicForCausalLM`; it is asked as at evaluation.
        input_ids: `(time,)` or `(1, time)`, the text, without padding.
        past_key_values: what the model remembers of a context of one row, e.g. from
            `mosaics.models.memory_file.load_memory`; it stays as it is.
        context_ids: the tokens of that context, as many as the cache has read.
        top: how many pairs of each head and position are kept.
        told: called with what is about to be done.

    Raises:
        ValueError: there is more than one row or no token, or the context's tokens are not as many as were read.
    """
    ids = input_ids[None] if input_ids.dim() == 1 else input_ids
    if ids.dim() != 2 or ids.shape[0] != 1 or not ids.shape[1]:
        raise ValueError(f"input_ids is {tuple(input_ids.shape)}; give the tokens of one text, (time,) or (1, time).")
    if top < 1:
        raise ValueError(f"top is {top}; give at least 1.")
    told = told or (lambda what: None)
    before = 0 if past_key_values is None else int(past_key_values.get_seq_length())
    known = torch.full((before,), -1) if context_ids is None else context_ids.reshape(-1).cpu()
    if len(known) != before:
        raise ValueError(f"context_ids has {len(known)} tokens and the cache has read {before}; give the same context.")

    def run(context: Context) -> Tensor:
        cache = copy.deepcopy(past_key_values)
        return model.model(
            ids, past_key_values=cache, use_cache=cache is not None, context=context, return_dict=True
        ).last_hidden_state[0]

    memories, training = list(model.model.stack.memories()), model.training
    names = list(dict.fromkeys(memory.name for memory in memories))
    model.eval()
    try:
        told("reading")
        with _inputs(model.model.norm) as found:
            hidden = run(Context())
        forecasts, stack = _forecasts(model, hidden, ids[0]), model.model.stack
        # With a memory around them, blocks see other positions than the text's: only what that memory shows is kept.
        inner = stack.around is None
        direction, bias = _directions(model, found[0][0], ids[0]) if inner else (hidden, None)
        told("looking at what was read")
        digest = Digest(torch.cat([known, ids[0].cpu()]), before, direction, _near(memories), top)
        with _inputs(stack) as entered, _effects(memories if inner else [], direction) as effects:
            run(Context(reads=digest))  # type: ignore[arg-type]
        if inner:
            effects = {(None, "embedding"): (entered[0][0] * direction).sum(-1)} | effects | {(None, "bias"): bias}
        without = {}
        for name in names if len(names) > 1 else ():
            told(f"reading without {name}")
            without[name] = _forecasts(model, run(Context(without=frozenset({name}))), ids[0])
    finally:
        model.train(training)
    for effect in effects.values():
        effect[-1] = math.nan
    effects = {key: effect.cpu() for key, effect in effects.items()}
    own = dict(reads=digest.reads, shown=digest.shown, averages=digest.averages)
    return Inspection(ids[0].cpu(), known, digest.near, forecasts, without, effects, **own)


@contextmanager
def _inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """The first argument of each call of a module."""
    found: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def _effects(memories: list[Any], direction: Tensor) -> Iterator[dict[tuple[int | None, str], Tensor]]:
    """By block and memory, what it adds along `direction` `(time, d)`."""
    found: dict[tuple[int | None, str], Tensor] = {}

    def hook(memory: Any, _: Any, output: tuple[Tensor, Any]) -> None:
        found[memory.layer_index, memory.name] = (output[0][0] * direction).sum(-1)

    handles = [memory.register_forward_hook(hook) for memory in memories]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _near(memories: list[Any]) -> int:
    """The largest reach of those that have one."""
    return max((farthest for memory in memories if (farthest := memory.reach()[1])), default=NEAR)


def _logit_scale(config: Any) -> float:
    return config.hidden_size**-0.5 if config.logit_scale is None else config.logit_scale


def _forecasts(model: Any, hidden: Tensor, ids: Tensor) -> Forecasts:
    """Of hidden states `(time, d)`, some positions at a time."""
    scale, parts = _logit_scale(model.config), []
    targets = torch.cat([ids[1:], ids[:1]])
    for piece, target in zip(hidden.split(PIECE), targets.split(PIECE), strict=True):
        logits = model.lm_head(piece) * scale
        logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        likeliest = logs.topk(min(LIKELIEST, logs.shape[-1]), dim=-1)
        parts.append((likeliest.indices, likeliest.values, logs.gather(-1, target[:, None])[:, 0]))
    tokens, logs, of_next = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    of_next[-1] = math.nan
    return Forecasts(tokens, logs, of_next)


def _directions(model: Any, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where the residual stream `x` `(time, d)` has to move for the logit of the next token to grow by 1 for each unit,
    while the final norm divides by what it divides by; and what the norm's own shift adds to that logit."""
    norm, wide = model.model.norm, torch.promote_types(x.dtype, torch.float32)
    x, words = x.to(wide), model.lm_head.weight[torch.cat([ids[1:], ids[:1]])].to(wide) * _logit_scale(model.config)
    direction = words * norm.weight.to(wide)
    shift = torch.zeros_like(direction[:, 0])
    if isinstance(norm, nn.LayerNorm):
        direction = direction - direction.mean(-1, keepdim=True)
        size = x.var(-1, unbiased=False, keepdim=True)
        if norm.bias is not None:
            shift = (words * norm.bias.to(wide)).sum(-1)
    else:
        size = x.square().mean(-1, keepdim=True)
    return direction * (size + norm.eps).rsqrt(), shift


@dataclass
class Digest:
    """Takes what memories show, and keeps what an `Inspection` says of it: the full weights of a few positions are held
    at a time.

    Attributes:
        tokens: `(context + time,)`, of the context before and of the text.
        before: tokens of the context before.
        direction: `(time, d)`, in which effects are measured.
        near: tokens back that count as near.
        top: pairs kept of each head and position.
    """

    tokens: Tensor
    before: int
    direction: Tensor
    near: int
    top: int
    reads: list[MemoryReads] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)
    averages: list[Average] = field(default_factory=list)

    def append(self, read: Read) -> None:
        """Digest what a memory shows of a pass over one row."""
        if read.rows is not None:
            self.reads.append(self._reads(read))
        if read.traces or read.maps:
            traces = {name: _kept(x[0]) for name, x in read.traces.items()}
            maps = {name: _kept(x[0]) for name, x in read.maps.items()}
            self.shown.append(Shown(read.memory, read.layer_index, traces, maps))
        if read.recurrence is not None:
            found, shares = _held(*(x[0].cpu() for x in read.recurrence))
            found = torch.where(found >= 0, found + self.before, -1)
            self.averages.append(Average(read.memory, read.layer_index, found, shares))

    def _reads(self, read: Read) -> MemoryReads:
        time, device = len(self.direction), self.direction.device
        span = read.span or (torch.zeros(time), torch.full((time,), read.slots))
        first, end = (x[0] if x.dim() == 2 else x for x in (x.to(device).long() for x in span))
        # Positions of the text and of the context before it; numbers of pairs that training filled.
        offset = self.before + time - read.slots if read.contextual else 0
        digested = self._by_weights if read.summary is None else self._summarised
        whole = digested(read, offset) | {"pairs": (end - first).clamp(min=0)}
        numbers = self._numbers(whole, read.contextual, first + offset, end + offset)
        whole |= self._effects(read, whole, offset)
        whole["effects"][:, -1] = whole["head_effects"][:, -1] = math.nan
        del whole["distance"], whole["repeats"]
        return MemoryReads(
            read.memory,
            read.layer_index,
            read.contextual,
            **{name: x.cpu() for name, x in whole.items()},
            residual=None if read.residual is None else _kept(read.residual[0]),
            numbers=numbers,
        )

    def _summarised(self, read: Read, offset: int) -> dict[str, Tensor]:
        """What is kept of the weights, as the memory itself says, with positions in the place of slots."""
        tokens = nn.functional.pad(self.tokens, (1, 0), value=-1)[offset:].to(self.direction.device)
        found = read.summary(self.top, self.near, tokens)
        slots, weights, entropy, near, distance, repeats = (x[0] for x in found)
        total = (weights[..., 0] > 0).to(weights)
        own = {"total": total, "effective": entropy.exp() * total, "near": near}
        slots = torch.where(slots >= 0, slots + offset, -1)
        return own | {"found": slots, "weights": weights, "distance": distance, "repeats": repeats}

    def _by_weights(self, read: Read, offset: int) -> dict[str, Tensor]:
        """The same from the weights, those of some positions at a time. Distances and repeats, which take longer, are
        NaN at some positions of a long text."""
        parts: list[dict[str, Tensor]] = []
        time, device = len(self.direction), self.direction.device
        every = max(1, time // LOOKED_AT)
        tokens = self.tokens.to(device)
        for number, begin in enumerate(range(0, time, BLOCK)):
            block = slice(begin, min(begin + BLOCK, time))
            weights, first = read.rows(block)
            weights = weights[0].to(torch.promote_types(weights.dtype, torch.float32))
            pairs = torch.arange(first, first + weights.shape[-1], device=device) + offset
            part = _top(weights, pairs, self.top) | _spread(weights)
            part |= dict.fromkeys(("near", "distance"), part["total"] * math.nan)
            part["repeats"] = part["near"][..., None].expand(-1, -1, 2)
            if read.contextual:
                own = self.before + torch.arange(block.start, block.stop, device=device)
                part["near"] = _near_share(weights, pairs, own, self.near)
                if number % every == 0:
                    part["distance"] = part["total"] * own - weights @ pairs.to(weights)
                    part["repeats"] = _repeats(weights, pairs, own, tokens)
            parts.append(part)
        return {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}

    def _effects(self, read: Read, part: dict[str, Tensor], offset: int) -> dict[str, Tensor]:
        """Of the pairs that are kept, and of all together."""
        weights, wide = part["weights"], self.direction.dtype
        if read.values is None or read.pull is None:
            return {"effects": torch.full_like(weights, math.nan), "head_effects": part["total"] * math.nan}
        values, found = read.values[0].expand(len(weights), -1, -1), (part["found"] - offset).clamp(min=0)
        pairs, heads = [], []
        for begin in range(0, weights.shape[1], PIECE):
            piece = slice(begin, min(begin + PIECE, weights.shape[1]))
            pulled = read.pull(self.direction[None, piece], piece)[0]  # (heads, positions, width)
            index = found[:, piece]
            read_of = values.gather(1, index.flatten(1)[..., None].expand(-1, -1, values.shape[-1])).to(wide)
            along = (read_of.unflatten(1, index.shape[1:]) * pulled[:, :, None]).sum(-1)
            pairs.append(weights[:, piece].to(wide) * along)
            heads.append((read.answer[0][:, piece].to(wide) * pulled).sum(-1))
        return {"effects": torch.cat(pairs, dim=1), "head_effects": torch.cat(heads, dim=1)}

    def _numbers(self, part: dict[str, Tensor], contextual: bool, first: Tensor, end: Tensor) -> list[HeadNumbers]:
        """Of each head, where a position may read the pairs from `first` to before `end`."""
        count = part["pairs"]
        reading, several = count > 0, count > 1
        means = [_mean(part["near"], reading), _mean(part["effective"] / count.clamp(min=1), several)]
        if contextual:
            known = reading & ~part["distance"][0].isnan()
            chances = self._chances(first, end) / count.clamp(min=1)
            for shares, chance in zip(part["repeats"].unbind(-1), chances, strict=True):
                some = known & (chance > 0)
                means += [_mean(shares, some), _mean(chance.expand_as(shares), some)]
            means.append(_mean(part["distance"], known))
        else:
            means += [torch.full_like(means[0], math.nan)] * 5
        return [_reader(*head, bool(reading.any()), contextual) for head in torch.stack(means, dim=1).tolist()]

    def _chances(self, first: Tensor, end: Tensor) -> Tensor:
        """`(2, time)`: how many of the pairs from `first` to before `end`, and before the position's own, have its
        token; and how many follow such."""
        tokens = self.tokens.to(first.device) + 1
        length = len(tokens)
        places = (tokens * length + torch.arange(length, device=first.device)).sort().values
        now, own = tokens[self.before :], torch.arange(self.before, length, device=first.device)
        end = torch.minimum(end, own)

        def until(place: Tensor) -> Tensor:
            return torch.searchsorted(places, now * length + place.clamp(min=0))

        found = [(until(end - back) - until(torch.minimum(first, end) - back)) * (now > 0) for back in (0, 1)]
        return torch.stack(found)


def _held(log_gate: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """The positions that weigh most in a leaky average `(heads, time, HELD)`, and their shares.

    A decay is the same for all that came before, so what weighs more among these always will: what weighs most is a
    running maximum, what weighs second a running maximum of what the first left, and so on.
    """
    # The logarithm of each weight, but for what has decayed since the beginning, which is the same for all.
    level = log_gate.double() - log_decay.double().clamp(min=-1e4).cumsum(-1)
    left, places, levels, found = level, torch.arange(level.shape[1]).expand_as(level), [], []
    for _ in range(HELD):
        most, index = left.cummax(-1)
        at = places.gather(-1, index)
        levels.append(most)
        found.append(at)
        before, at_before = nn.functional.pad(most, (1, -1), value=-torch.inf), nn.functional.pad(at, (1, -1), value=-1)
        beaten = left >= before
        left, places = torch.where(beaten, before, left), torch.where(beaten, at_before, places)
    shares = (torch.stack(levels, dim=-1) - level.logcumsumexp(-1)[..., None]).exp()
    none, dtype = shares < LEAST, torch.promote_types(log_gate.dtype, torch.float32)
    return torch.stack(found, dim=-1).masked_fill(none, -1), shares.masked_fill(none, 0.0).to(dtype)


def _kept(x: Tensor) -> Tensor:
    """On the processor, in float32 or wider; a copy, as what a memory shows may be part of something larger."""
    return x.detach().to("cpu", torch.promote_types(x.dtype, torch.float32), copy=True)


def _top(weights: Tensor, pairs: Tensor, top: int) -> dict[str, Tensor]:
    """The pairs with the largest weights `(heads, positions, top)`, by size; -1 where there are fewer."""
    size = min(top, weights.shape[-1])
    index = _largest(weights if bool(weights.amin() >= 0) else weights.abs(), size)
    kept, found = weights.gather(-1, index), pairs[index]
    found = torch.where(kept == 0, -1, found)
    missing = (0, top - size)
    return {"found": nn.functional.pad(found, missing, value=-1), "weights": nn.functional.pad(kept, missing)}


def _largest(x: Tensor, count: int) -> Tensor:
    """Where the largest numbers of each row are: in the `count` parts of it whose largest are largest."""
    if x.shape[-1] < 2 * PART * count:
        return x.topk(count, dim=-1).indices
    whole = x.shape[-1] // PART * PART
    parts = x[..., :whole].unflatten(-1, (-1, PART))
    chosen = parts.amax(-1).topk(count, dim=-1).indices
    places = (chosen[..., None] * PART + torch.arange(PART, device=x.device)).flatten(-2)
    rest = torch.arange(whole, x.shape[-1], device=x.device).expand(*places.shape[:-1], -1)
    places = torch.cat([places, rest], dim=-1)
    return places.gather(-1, x.gather(-1, places).topk(count, dim=-1).indices)


def _spread(weights: Tensor) -> dict[str, Tensor]:
    """Sums of the weights and effective numbers of pairs `(heads, positions)`. Weights of either sign count by their
    size, as shares of the sum of sizes."""
    total = sizes = weights.sum(-1)
    if bool(weights.amin() < 0):
        weights = weights.abs()
        sizes = weights.sum(-1)
    # `entr` takes six times as long.
    entropy = -weights.clamp(min=torch.finfo(weights.dtype).tiny).log_().mul_(weights).sum(-1)
    there = sizes > 0
    sizes = torch.where(there, sizes, 1)
    return {"total": total, "effective": torch.where(there, (entropy / sizes + sizes.log()).exp(), 0)}


def _near_share(weights: Tensor, pairs: Tensor, own: Tensor, near: int) -> Tensor:
    """The share `(heads, positions)` read of pairs that are at most `near` tokens back."""
    begin = int((pairs < own[0] - near).sum())
    return (weights[..., begin:] * (pairs[begin:] >= own[:, None] - near)).sum(-1)


def _repeats(weights: Tensor, pairs: Tensor, own: Tensor, tokens: Tensor) -> Tensor:
    """`(heads, positions, 2)`, the shares read of earlier pairs with the position's token, and of those that follow
    such."""
    now, past = tokens[own][:, None], torch.where(pairs > 0, tokens[(pairs - 1).clamp(min=0)], -1)
    earlier = (pairs < own[:, None]) & (now >= 0)
    masks = [earlier & (of == now) for of in (tokens[pairs], past)]
    return torch.bmm(weights.transpose(0, 1), torch.stack(masks, dim=-1).to(weights)).transpose(0, 1)


def _mean(x: Tensor, where: Tensor) -> Tensor:
    """Of `(heads, time)`, over some of the time."""
    return x[:, where].double().mean(-1)


def _reader(
    near: float,
    evenness: float,
    same: float,
    same_by_chance: float,
    behind: float,
    behind_by_chance: float,
    distance: float,
    reading: bool,
    contextual: bool,
) -> HeadNumbers:
    """The numbers of a head, and what kind they make it."""
    both = (same, same_by_chance), (behind, behind_by_chance)
    repeats, by_chance = max(both, key=lambda one: -1.0 if math.isnan(one[0]) else one[0])
    if not reading:
        kind = "silent"
    elif not contextual:
        kind, near = "persistent", math.nan
    elif repeats - by_chance >= 0.3:
        kind = "induction-like"
    elif evenness >= 0.5:
        kind = "uniform"
    else:
        kind = "recent" if near >= 0.5 else "document-wide"
    return HeadNumbers(near, evenness, repeats, by_chance, distance, kind)
