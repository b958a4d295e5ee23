"""What a request may ask, in OpenAI's words.

A field that OpenAI does not know is refused. One that it knows and that nothing here serves is taken where it asks for
nothing (a penalty of 0, no tools), and refused otherwise, so that no answer is other than what was asked for.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Text = Annotated[str, Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Nothing = Annotated[list[Any], Field(max_length=0)] | None
Zero = Annotated[float, Field(ge=0, le=0)] | None


class _Body(BaseModel):
    # A limit of any size makes pydantic look into texts, and refuse half of a surrogate pair.
    model_config = ConfigDict(extra="forbid", strict=True, str_max_length=1 << 40)


class StreamOptions(_Body):
    """`include_usage`: a last chunk says how many tokens there were."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # without effect


class _Asked(_Body):
    """What both kinds of requests have in common; `memory` is the id of what comes before the prompt."""

    model: str
    memory: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # Without effect.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    # Taken where they ask for nothing.
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None


class CompletionRequest(_Asked):
    """The body of `/v1/completions`: texts or tokens to go on from."""

    prompt: str | Annotated[list[str] | list[int] | list[list[int]], Field(min_length=1, max_length=128)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None


class Part(_Body):
    """A part of what was said: text alone."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """What was said, and by whom."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None


class ChatRequest(_Asked):
    """The body of `/v1/chat/completions`: the conversation so far."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Nothing = None
    functions: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    modalities: list[Literal["text"]] | None = None


class MemoryRequest(_Body):
    """The body of `POST /v1/memories`: a text to be read once; `memory` is the id of one that comes before it."""

    text: Text
    model: str | None = None
    memory: str | None = None
