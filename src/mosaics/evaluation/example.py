"""What a task asks, and what came out of it."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Example:
    """One question to a model.

    Attributes:
        id: unique in its suite and the same whenever the suite is built with the same settings.
        prompt: text, or token ids where a task is about tokens. Comes after `prefix`.
        references: the accepted answers.
        choices: the possible answers (with the white space before them), if the model is to choose.
        prefix: text that many consecutive examples have in common; it is encoded once.
        ending: text that has to follow a chosen answer, scored with it, so that no choice wins by being the
            beginning of another.
        meta: what the results are grouped by (length, depth, shots ...).
    """

    id: str
    prompt: str | list[int]
    references: list[str]
    choices: list[str] | None = None
    prefix: str = ""
    ending: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 (first 16 hexadecimal digits) of all that the model is shown."""
        shown = json.dumps([self.prefix, self.prompt, self.choices, self.ending], ensure_ascii=False)
        return hashlib.sha256(shown.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True)
class Record:
    """A model's answer to one example, as it stands in the results."""

    id: str
    prompt_digest: str
    prediction: Any
    references: list[str]
    score: float
    meta: dict[str, Any]

    @classmethod
    def of(cls, example: Example, prediction: Any, score: float, **meta: Any) -> "Record":
        return cls(example.id, example.digest, prediction, example.references, float(score), example.meta | meta)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Record":
        """What `to_dict` gave.

        Raises:
            TypeError: something else.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or sorted(values) != sorted(names):
            raise TypeError(f"an answer has {', '.join(names)} and nothing else")
        record = cls(**values)
        kinds = {"id": str, "prompt_digest": str, "references": list, "score": int | float, "meta": dict}
        for name, kind in kinds.items():
            if not isinstance(getattr(record, name), kind):
                raise TypeError(f"the {name} of an answer is {getattr(record, name)!r:.50}")
        if not math.isfinite(record.score):
            raise TypeError(f"the score of {record.id} is {record.score}")
        return record

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Prompts:
    """Examples that are built one at a time, as often as wanted."""

    def __init__(self, count: int, build: Callable[[], Iterator[Example]]):
        self._count, self._build = count, build

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Example]:
        return self._build()
