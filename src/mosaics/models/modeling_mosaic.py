"""The mosaic as a transformers model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import TransformersKwargs, can_return_tuple

from mosaics.inspection import Inspection
from mosaics.inspection import inspect as looked_into
from mosaics.memories import Context, Layout, Memory, Read, Stack
from mosaics.memories.contract import init_clamped_normal, nearest
from mosaics.models.cache import close_cache, open_cache
from mosaics.models.configuration_mosaic import MosaicConfig
from mosaics.models.documents import documents_of
from mosaics.models.draws import checked, drawn
from mosaics.models.loss import pays_in_pieces, shifted_targets, total_loss


class MosaicPreTrainedModel(PreTrainedModel):
    """What every mosaic model shares with transformers: initialisation and what it can do."""

    config_class = MosaicConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _no_split_modules = ["Block"]

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """Initialise every module that is not loaded. Of custom code transformers would pass over all that have no
        missing parameter of their own: also over a memory that is made of maps alone."""
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Memory):
            _reset_missing(module)
        elif isinstance(module, nn.Embedding):
            self._init_words(module.weight)
        elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
            init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            owners = [m for m in self.modules() if isinstance(m, Memory) and any(c is module for c in m.modules())]
            if not owners:  # the classifier, also one that is being made anew for another vocabulary
                self._init_words(module.weight)
            elif any(map(_is_loaded, owners[-1].parameters())):
                # A file held a part of a memory: transformers then asks for the missing maps alone.
                _reset_missing(owners[-1])

    def _init_words(self, weight: Tensor) -> None:
        if not _is_loaded(weight):
            init_clamped_normal(weight, self.config.embedding_scale * self.config.hidden_size**-0.5)


# What transformers' loops pass to models: that says where documents begin; is of the loss; or changes nothing.
_BORDERS = {"seq_idx", "cu_seq_lens_q", "cu_seq_lens_k"}
_OF_THE_LOSS = {"num_items_in_batch", "shift_labels"}
_UNUSED = {"token_type_ids", "cache_position", "max_length_q", "max_length_k"}
_UNUSED |= {"output_attentions", "output_router_logits", "is_causal"}


def _begins(kwargs: dict[str, Any], forward: Callable) -> dict[str, Tensor | None]:
    """What of the keyword arguments of a forward pass says where documents begin: `seq_idx`, `cu_seq_lens`.

    Raises:
        ValueError: queries and keys have other documents, or attention is not to be causal.
        TypeError: there is no such argument; the nearest is named.
    """
    found = {"seq_idx": kwargs.get("seq_idx"), "cu_seq_lens": kwargs.get("cu_seq_lens_q")}
    of_keys = kwargs.get("cu_seq_lens_k")
    if of_keys is not None:
        if found["cu_seq_lens"] is not None and not torch.equal(found["cu_seq_lens"], of_keys.to(found["cu_seq_lens"])):
            raise ValueError(
                "cu_seq_lens_q and cu_seq_lens_k disagree; a mosaic's queries and keys are the same tokens."
            )
        found["cu_seq_lens"] = of_keys
    if kwargs.get("is_causal") is False:
        raise ValueError("A mosaic's memories read the past alone; leave out is_causal=False.")
    known = _BORDERS | _OF_THE_LOSS | _UNUSED
    for name in kwargs.keys() - known:
        valid = known | set(inspect.signature(forward).parameters) - {"kwargs"}
        raise TypeError(f"A mosaic's forward pass has no argument {name!r}; {nearest(name, valid)}")
    return found


def _is_loaded(parameter: Tensor) -> bool:
    return getattr(parameter, "_is_hf_initialized", False)


def _reset_missing(memory: Memory) -> None:
    """Initialise a memory, but keep what was loaded; memories inside it are asked for themselves."""
    inner = {p for m in memory.modules() if m is not memory and isinstance(m, Memory) for p in m.parameters()}
    own = [p for p in memory.parameters() if p not in inner]
    if all(map(_is_loaded, own)):
        return
    loaded = {p: p.clone() for p in memory.parameters() if _is_loaded(p)}  # also of memories inside, which it resets
    memory.reset_parameters(memory.layer_index)
    for parameter, value in loaded.items():
        parameter.copy_(value)


class MosaicModel(MosaicPreTrainedModel):
    """Embedding, stack of blocks of memories, final norm.

    Args:
        config: the arrangement of memories.
    """

    def __init__(self, config: MosaicConfig) -> None:
        super().__init__(config)
        norm = _layer_norm(config.bias) if config.norm == "layer" else nn.RMSNorm
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        rows = config.learned_positions
        self.embed_positions = None if rows is None else nn.Embedding(rows, config.hidden_size)
        self.stack = Stack(config.block_steps(), norm, config.common(), config.around)
        self.norm = norm(config.hidden_size, config.norm_eps)
        self.post_init()

    def check(self, context_length: int) -> None:
        """Raises `ValueError` if the model can't be trained, or a memory makes no sense, at so many tokens."""
        if self.embed_positions is not None:
            _check_positions(context_length, self.embed_positions.num_embeddings)
        self.stack.check(context_length)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        context: Context | None = None,
        layout: tuple[Layout, Tensor | None] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """The hidden states; the arguments are those of `MosaicForCausalLM.forward`, and the pass's `context`."""
        borders = _begins(kwargs, self.forward)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given.dim() != (2 if inputs_embeds is None else 3):
            raise ValueError(
                f"The input has shape {tuple(given.shape)}; give (batch, time), or (batch, time, d) embeddings."
            )
        if given.is_floating_point() == (inputs_embeds is None) or given.dtype == torch.bool:
            raise ValueError(f"The input is {given.dtype}; give input_ids as integers, or embeddings as floats.")
        if inputs_embeds is not None and given.shape[2] != self.config.hidden_size:
            raise ValueError(
                f"inputs_embeds is {given.shape[2]} wide and the model {self.config.hidden_size}; give as wide ones."
            )
        batch, time = given.shape[:2]
        if time == 0:
            raise ValueError("The input has no tokens; give at least one for each row.")
        if borders.get("seq_idx") is not None:
            if document_ids is not None:
                raise ValueError("seq_idx and document_ids both say which document a token is of; give one of them.")
            document_ids = borders.pop("seq_idx")
        for name, x in (("attention_mask", attention_mask), ("document_ids", document_ids)):
            if x is not None and (x.dim() != 2 or x.shape[0] != batch or x.shape[1] < time):
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)}; give one number for each of the {batch} x {time} positions."
                )
        if document_ids is not None and document_ids.shape[1] != time:
            raise ValueError(f"document_ids has {document_ids.shape[1]} positions and the input {time}; give as many.")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            state, rows, stored = open_cache(past_key_values, self.stack, batch, time)
        else:
            state, rows, stored = None, None, 0
        if attention_mask is not None:
            if not isinstance(stored, Tensor) and attention_mask.shape[1] not in (time, stored + time):
                also = f", or of all {stored + time} with those in the cache" if stored else ""
                raise ValueError(
                    f"attention_mask has {attention_mask.shape[1]} positions; give those of the input, {time}{also}."
                )
            attention_mask = attention_mask[:, -time:]
        if position_ids is not None or borders.get("cu_seq_lens") is not None:
            document_ids = documents_of(
                (batch, time),
                attention_mask,
                ids=document_ids,
                position_ids=position_ids,
                cu_seq_lens=borders.get("cu_seq_lens"),
                open_document=None if rows is None else rows.document,
                cached=stored > 0,
            )
        if layout is None:
            *layout, rows = Layout.of(batch, time, attention_mask, document_ids, rows, stored)
        elif any(x is not None for x in (past_key_values, attention_mask, document_ids)):
            raise ValueError("A layout says what each position is; give no cache, mask or document_ids with it.")
        layout, order = layout
        if context is None:
            context = Context()
        context.layout, context.order = layout, order
        if not self.training or state is not None:
            context.draw = None
        elif context.draw is None:
            context.draw = drawn(self)
        if order is not None:
            given = given.gather(1, order if inputs_embeds is None else order[..., None].expand_as(given))
        if (padding := layout.is_padding) is not None:  # whatever is there must not reach anything
            given = given.masked_fill(padding if inputs_embeds is None else padding[..., None], 0)
        try:
            x = self.embed_tokens(given) if inputs_embeds is None else given
        except IndexError:
            raise ValueError(
                f"input_ids has tokens from {given.min()} to {given.max()}; give tokens from 0 to "
                f"{self.config.vocab_size - 1}."
            ) from None
        context.embeddings = x
        if self.embed_positions is not None:
            position, longest = layout.position(x.device), layout.stored + layout.time
            if padding is not None:
                position = position.masked_fill(padding, 0)
            if layout.start is not None or padding is not None:
                longest = int(position.max()) + 1 if position.numel() else 0
            _check_positions(longest, self.embed_positions.num_embeddings)
            x = x + self.embed_positions(position)
        dropout = self.config.embedding_dropout
        x = F.dropout(x, self.config.dropout if dropout is None else dropout, self.training)

        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_hidden_states and self.stack.around is not None:
            raise ValueError("What enters the blocks is not what goes in, with a memory around; ask for the logits.")
        trace: list[Tensor] | None = [] if output_hidden_states else None
        x, state = self.stack(x, layout, state, context, self.norm, *([] if trace is None else [trace]))
        hidden_states = None if trace is None else tuple(_restored(h, order, layout) for h in [*trace, x])
        if past_key_values is not None:
            close_cache(past_key_values, self.stack, state, rows, time)
        return BaseModelOutputWithPast(
            last_hidden_state=_restored(x, order, layout),
            past_key_values=past_key_values if use_cache else None,
            hidden_states=hidden_states,
        )


def _check_positions(length: int, rows: int) -> None:
    """Raises `ValueError` if documents of a length have no learned position for every token."""
    if length > rows:
        raise ValueError(
            f"A document of {length} tokens is longer than the {rows} learned positions of the model; give shorter "
            "ones, or a model with more learned_positions."
        )


class MosaicForCausalLM(MosaicPreTrainedModel, GenerationMixin):
    """A language model made of associative memories.

    Args:
        config: the arrangement of memories, e.g. `MosaicConfig.from_preset("memory-mosaics-v2-tiny")`.

    Raises:
        ValueError: the sizes are impossible.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MosaicConfig) -> None:
        super().__init__(config)
        self.model = MosaicModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        draw: float | None = None,
        loss_only: bool = False,
        context: Context | None = None,
        layout: tuple[Layout, Tensor | None] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Logits for the token after each position, and the loss.

        Args:
            input_ids: `(batch, time)` integers.
            attention_mask: `(batch, time)` or, on a cached call, `(batch, all positions so far)`; 0 is padding, which
                may lie anywhere and changes nothing.
            document_ids: `(batch, time)` integers. A document begins wherever the id changes from the previous real
                token; no memory sees another document. On a cached call without ids the open document goes on.
            position_ids: `(time,)`, `(1, time)` or `(batch, time)`. A mosaic counts positions itself, if at all; where
                these restart (are not larger than that of the real token before, or 0 at the first of a cached call),
                a document begins.
            inputs_embeds: `(batch, time, d)` in the place of `input_ids`.
            labels: `(batch, time)`, usually the `input_ids`; they are shifted here. -100, padding and targets in
                another document than their position are not counted.
            past_key_values: `DynamicCache(config=model.config)`, a `StaticCache`, or what an earlier call returned; it
                is changed in place.
            use_cache: whether to return the cache; by default at evaluation only.
            logits_to_keep: logits (and loss) for the last so many positions only, or for the given ones; 0 keeps all.
            output_hidden_states: whether to return what enters each block, and the final states.
            output_attentions: refused; see `read_weights`.
            return_dict: False for a tuple.
            draw: the step's random number in [0, 1), from which the long-term memory takes its delay in training. By
                default that of `mosaics.draw`, or else one that a model in training keeps until an optimizer has
                stepped, and that follows from torch's seed and the number of steps: micro-batches share it, and
                processes that were seeded alike. Without effect at evaluation or with a cache.
            loss_only: whether to leave the logits out. The loss then need not hold those of all positions at once,
                which takes less memory and time.
            context: a sink for what the pass leaves beside its output; made when not given.
            layout: what each position is, and the compact order, as `laid_out` gives them with the `shift_labels`; in
                the place of `attention_mask` and `document_ids`, without a cache.
            kwargs: what transformers' loops pass to models. `num_items_in_batch`: what the sum of the loss is divided
                by, in the place of the number of counted targets, so that accumulated gradients weigh all targets
                alike; auxiliary losses are weighed by the counted share of it. `cu_seq_lens_q`, `cu_seq_lens_k` (of
                one row) and `seq_idx` say where documents begin. `shift_labels`: targets that are shifted already.
                `max_length_q`, `max_length_k`, `cache_position`, `token_type_ids` and the like change nothing.

        Returns:
            `loss` (mean nats over the counted targets), `logits` `(batch, kept, vocabulary)` or None,
            `past_key_values`, `hidden_states`.

        Raises:
            ValueError: shapes do not fit, the cache is of another kind, what says where documents begin disagrees, a
                document is longer than the learned positions, or something unsupported is asked for.
            TypeError: there is no such argument.
        """
        shifted, items = kwargs.pop("shift_labels", None), kwargs.pop("num_items_in_batch", None)
        if output_attentions:
            raise ValueError("A mosaic has no attentions; call read_weights for what its memories read.")
        if loss_only and labels is None and shifted is None:
            raise ValueError("loss_only is given without labels; give labels, or leave it out for the logits.")
        context = context or Context()
        if draw is not None:
            context.draw = checked(draw)
        elif self.training and context.draw is None:
            context.draw = drawn(self)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            document_ids=document_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            context=context,
            layout=layout,
            **kwargs,
        )
        hidden = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        scale = self.config.hidden_size**-0.5 if self.config.logit_scale is None else self.config.logit_scale
        logits = loss = None
        if not (loss_only and pays_in_pieces(self.lm_head, hidden)):
            logits = self.lm_head(hidden)
            if scale != 1:
                logits = logits * scale
        elif scale != 1:
            hidden = hidden * scale
        if labels is not None or shifted is not None:
            targets = shifted_targets(labels, shifted, outputs.last_hidden_state, context)
            total, counted = total_loss(targets, logits_to_keep, logits, hidden, self.lm_head)
            if items is None:  # over max(count, 1): a batch without a target has a loss of 0, not NaN
                loss, share = total / counted.clamp(min=1), 1.0
            else:
                items = items.to(total.device) if isinstance(items, Tensor) else items
                loss, share = total / items, counted / items
            if self.training:
                for auxiliary in context.auxiliary_losses:
                    loss = loss + share * auxiliary
        return CausalLMOutputWithPast(
            loss=loss,
            logits=None if loss_only else logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As transformers does it, without what a mosaic has no use for.

        Raises:
            ValueError: `document_ids` are given, or positions that restart: they are for scoring and training.
        """
        if kwargs.get("document_ids") is not None:
            raise ValueError("generate takes no document_ids; give each document a row of its own, padded on the left.")
        positions, mask = kwargs.pop("position_ids", None), kwargs.get("attention_mask")
        if positions is not None and positions.shape[-1] > 1:
            real = None if mask is None else mask[:, -positions.shape[-1] :]
            shape = positions.shape if real is None else real.shape  # of embeddings, input_ids are empty
            if documents_of(tuple(shape), real, position_ids=positions) is not None:
                raise ValueError("generate takes no positions that restart; give each document a row of its own.")
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        for name in ("position_ids", "tokenizer"):  # generate passes on the one that it needs for stop strings
            inputs.pop(name, None)
        return inputs

    @torch.no_grad()
    def read_weights(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, document_ids: Tensor | None = None
    ) -> list[Read]:
        """What every memory reads at evaluation, at every position, as weights over the stored pairs.

        Args:
            input_ids: `(batch, time)`.
            attention_mask: as in `forward`.
            document_ids: as in `forward`.

        Returns:
            One `Read` for each memory that stores pairs. Its weights `(batch, heads, time, time)` are made when they
            are asked for: keep the time short, or see `inspect`.
        """
        context, training = Context(reads=[]), self.training
        self.eval()
        try:
            self.model(input_ids, attention_mask, document_ids, use_cache=False, context=context)
        finally:
            self.train(training)
        return [read for read in context.reads if read.rows is not None]

    def inspect(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        context_ids: Tensor | None = None,
        top: int = 4,
        told: Callable[[str], None] | None = None,
    ) -> Inspection:
        """What every memory retrieved for every token of a text, and what it was worth: `mosaics.inspection.inspect`,
        which has the arguments."""
        return looked_into(self, input_ids, past_key_values, context_ids, top, told)

    def remove_memories(self, name: str) -> None:
        """Take every memory of a name or type out of the model, with its parameters (Tables 2, 9 and 10: the long-term
        memory).

        Args:
            name: e.g. `"long_term"`.

        Raises:
            ValueError: the model has no such memory, or would be left without any.
        """
        memories = list(self.model.stack.memories())
        if not any(name in (memory.name, memory.type) for memory in memories):
            present = {memory.name for memory in memories}
            raise ValueError(f"The model has no {name!r} memory; {nearest(name, present)}")
        if all(name in (memory.name, memory.type) for memory in memories):
            raise ValueError(f"{name!r} is the only kind of memory in the model; nothing would be left.")
        stack, config = self.model.stack, copy.deepcopy(self.config)  # another model may share the config
        for block in stack.blocks:
            block.remove(name)
        stack.blocks = nn.ModuleList(block for block in stack.blocks if len(block.steps))
        if stack.around is not None and name in (stack.around.name, stack.around.type):
            stack.around = None
        config.remove_memories(name)
        self.config = self.model.config = config

    def undecayed_parameters(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone: scalars and norms, and what the memories name."""
        names = {name for name, parameter in self.named_parameters() if parameter.dim() < 2}
        for prefix, module in self.named_modules():
            if isinstance(module, Memory):
                names |= {f"{prefix}.{name}" for name in module.undecayed_parameters()}
        return names

    def describe(self, context_length: int | None = None) -> dict[str, Any]:
        """Parameters by kind, operations and decoding state; works on the meta device.

        Args:
            context_length: in tokens; by default the training context.

        Returns:
            `parameters` (`total`, `by_kind`), `context_length`, `flops_per_token` (forward, averaged over the context),
            `state_bytes` (of one sequence of that length, in the model's dtype,
            its pairs in that of `config.state_dtype`).
        """
        context_length = context_length or self.config.max_position_embeddings
        kinds: dict[str, int] = {}
        for memory in self.model.stack.memories():
            kinds[memory.type] = kinds.get(memory.type, 0) + sum(p.numel() for p in memory.parameters())
        kinds["embedding"] = self.model.embed_tokens.weight.numel()
        kinds["classifier"] = 0 if self.config.tie_word_embeddings else self.lm_head.weight.numel()
        total = sum(p.numel() for p in self.parameters())
        if (positions := self.model.embed_positions) is not None:
            kinds["positions"] = positions.weight.numel()
        kinds["norms"] = total - sum(kinds.values())
        return {
            "parameters": {"total": total, "by_kind": kinds},
            "context_length": context_length,
            "flops_per_token": self.model.stack.flops(context_length) + 2 * self.lm_head.weight.numel(),
            "state_bytes": self.model.stack.state_bytes(context_length, self.dtype.itemsize),
        }


def _restored(x: Tensor, order: Tensor | None, layout: Layout) -> Tensor:
    """Compact rows `(batch, time, d)` back in the order they came in, with 0 at padding."""
    if (padding := layout.is_padding) is not None:
        x = x.masked_fill(padding[..., None], 0)
    return x if order is None else torch.empty_like(x).scatter_(1, order[..., None].expand_as(x), x)


def _layer_norm(bias: bool):
    return lambda width, eps: nn.LayerNorm(width, eps, bias=bias)
