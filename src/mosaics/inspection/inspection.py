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
LOOKED_AT = 2048  # positions that the numbers of a head are averaged over, about
NEAR = 64  # tokens back that count as near where no memory of the model has a window
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
            so that all sum to that logit. NaN after the last token.
        reads: of every memory that shows pairs, in their order.
        shown: of every memory that declares traces or maps.
    """

    ids: Tensor
    context_ids: Tensor
    near: int
    forecasts: Forecasts
    without: dict[str, Forecasts]
    effects: dict[tuple[int | None, str], Tensor]
    reads: list[MemoryReads]
    shown: list[Shown]

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
        ValueError: there is more than one row or no token, or the context's tokens are not as many as were read; or a
            memory around the blocks lets them see other positions than those of the text.
    """
    if (around := model.model.stack.around) is not None:
        raise ValueError(
            f"the memory {around.name!r} around the blocks gives them positions that are no tokens of the text, so "
            "what they read can't be shown by token; inspect a model without it."
        )
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
            forecasts = _forecasts(model, run(Context()), ids[0])
        direction, bias = _directions(model, found[0][0], ids[0])
        told("looking at what was read")
        digest = Digest(torch.cat([known, ids[0].cpu()]), before, direction, _near(memories), top)
        with _inputs(model.model.stack) as entered, _effects(memories, direction) as effects:
            run(Context(reads=digest))  # type: ignore[arg-type]
        parts = {(None, "embedding"): (entered[0][0] * direction).sum(-1)} | effects | {(None, "bias"): bias}
        without = {}
        for name in names if len(names) > 1 else ():
            told(f"reading without {name}")
            without[name] = _forecasts(model, run(Context(without=frozenset({name}))), ids[0])
    finally:
        model.train(training)
    for effect in parts.values():
        effect[-1] = math.nan
    parts = {key: effect.cpu() for key, effect in parts.items()}
    return Inspection(ids[0].cpu(), known, digest.near, forecasts, without, parts, digest.reads, digest.shown)


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

    def append(self, read: Read) -> None:
        """Digest what a memory shows of a pass over one row."""
        if read.rows is not None:
            self.reads.append(self._reads(read))
        if read.traces or read.maps:
            traces = {name: _kept(x[0]) for name, x in read.traces.items()}
            maps = {name: _kept(x[0]) for name, x in read.maps.items()}
            self.shown.append(Shown(read.memory, read.layer_index, traces, maps))

    def _reads(self, read: Read) -> MemoryReads:
        time = len(self.direction)
        blocks = [slice(begin, min(begin + BLOCK, time)) for begin in range(0, time, BLOCK)]
        every = max(1, time // LOOKED_AT)
        span = read.span or (torch.zeros(time), torch.full((time,), read.slots))
        first_of, end_of = (x[0] if x.dim() == 2 else x for x in (x.to(self.direction.device) for x in span))
        parts: list[dict[str, Tensor]] = []
        sums: list[Tensor] = []
        for number, block in enumerate(blocks):
            weights, first = read.rows(block)
            weights = weights[0].to(torch.promote_types(weights.dtype, torch.float32))
            slots = torch.arange(first, first + weights.shape[-1], device=weights.device)
            # Positions of the text and of the context before it; numbers of pairs that training filled.
            offset = self.before + time - read.slots if read.contextual else 0
            pairs = slots + offset
            own = self.before + torch.arange(block.start, block.stop, device=weights.device)
            part = _top(weights, pairs, self.top) | _spread(weights)
            part["near"] = _near_share(weights, pairs, own, self.near) if read.contextual else part["total"] * math.nan
            if read.values is not None and read.pull is not None:
                part |= self._effects(read, block, part, offset)
            parts.append({name: x.cpu() for name, x in part.items()})
            if number % every == 0:
                there = (slots >= first_of[block, None]) & (slots < end_of[block, None])
                sums.append(self._sums(weights, there, pairs if read.contextual else None, own, part))
        whole = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
        if "effects" not in whole:
            whole["effects"] = torch.full_like(whole["weights"], math.nan)
            whole["head_effects"] = torch.full_like(whole["total"], math.nan)
        whole["effects"][:, -1] = whole["head_effects"][:, -1] = math.nan
        return MemoryReads(
            read.memory,
            read.layer_index,
            read.contextual,
            **whole,
            pairs=(end_of - first_of).clamp(min=0).long().cpu(),
            residual=None if read.residual is None else _kept(read.residual[0]),
            numbers=[_numbers(head, read.contextual) for head in torch.stack(sums).sum(0).tolist()],
        )

    def _effects(self, read: Read, block: slice, part: dict[str, Tensor], offset: int) -> dict[str, Tensor]:
        """Of the pairs that are kept, and of all together."""
        wide = self.direction.dtype
        pulled = read.pull(self.direction[None, block], block)[0]  # (heads, positions, width)
        values, index = read.values[0], (part["found"] - offset).clamp(min=0)
        values = values.expand(index.shape[0], -1, -1)
        found = values.gather(1, index.flatten(1)[..., None].expand(-1, -1, values.shape[-1])).to(wide)
        found = found.unflatten(1, index.shape[1:])
        effects = part["weights"].to(wide) * (found * pulled[:, :, None]).sum(-1)
        answer = read.answer[0][:, block].to(wide)
        return {"effects": effects, "head_effects": (answer * pulled).sum(-1)}

    def _sums(
        self, weights: Tensor, there: Tensor, pairs: Tensor | None, own: Tensor, part: dict[str, Tensor]
    ) -> Tensor:
        """`(heads, 11)`, what `_numbers` takes, where `there` says which pairs each position may read."""
        count = there.sum(-1).expand(weights.shape[:2])
        reading, several = ((count > least).to(weights) for least in (0, 1))
        evenness = several * part["effective"] / count.clamp(min=1)
        columns = [reading, several, evenness]
        if pairs is None:
            columns += [torch.zeros_like(reading)] * 8
        else:
            distance = part["total"] * own - weights @ pairs.to(weights)
            now = self.tokens.to(own.device)[own]
            at = self.tokens.to(own.device)[pairs]
            past = torch.where(pairs > 0, self.tokens.to(own.device)[(pairs - 1).clamp(min=0)], -1)
            columns += [reading * part["near"], distance]
            earlier = (pairs < own[:, None]) & (now[:, None] >= 0)
            masks = [earlier & (tokens == now[:, None]) for tokens in (at, past)]
            shares = torch.bmm(weights.transpose(0, 1), torch.stack(masks, dim=-1).to(weights)).permute(2, 1, 0)
            for repeated, share in zip(masks, shares, strict=True):
                chance = (there & repeated).sum(-1).expand_as(count) / count.clamp(min=1)
                columns += [(chance > 0).to(weights), (chance > 0) * share, chance]
        return torch.stack([x.sum(-1) for x in columns], dim=-1).cpu().double()


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


def _numbers(sums: list[float], contextual: bool) -> HeadNumbers:
    """From sums over positions: how many read, and have several pairs; evenness, share near, distance; and for repeats
    and what followed them how many have some, the shares read there, and those by chance."""

    def mean(total: float, count: float) -> float:
        return total / count if count else math.nan

    reading, several = sums[:2]
    evenness, near, distance = mean(sums[2], several), mean(sums[3], reading), mean(sums[4], reading)
    both = [(mean(share, count), mean(chance, count)) for count, share, chance in (sums[5:8], sums[8:])]
    repeats, by_chance = max(both, key=lambda one: -1.0 if math.isnan(one[0]) else one[0])
    if not reading:
        kind = "silent"
    elif not contextual:
        kind, near, distance = "persistent", math.nan, math.nan
    elif repeats - by_chance >= 0.3:
        kind = "induction-like"
    elif evenness >= 0.5:
        kind = "uniform"
    else:
        kind = "recent" if near >= 0.5 else "document-wide"
    return HeadNumbers(near, evenness, repeats, by_chance, distance, kind)
