"""Tokens as pieces of text."""

from __future__ import annotations

from typing import Any

LONGEST = 16  # tokens that one character may take


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The piece of text that each token adds. Of a character that takes several tokens the first has it, and the others
    have nothing.

    Args:
        tokenizer: of the model.
        ids: tokens that follow each other; -1 is an unknown one.
    """

    def decoded(tokens: list[int]) -> str:
        known = [token for token in tokens if token >= 0]
        return tokenizer.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    found, before, waiting = [""] * len(ids), [], 0
    for number, token in enumerate(ids):
        if token < 0:
            found[number], before, waiting = "?", [], number + 1
            continue
        whole = decoded(before + ids[waiting : number + 1])
        if whole.endswith("\N{REPLACEMENT CHARACTER}") and number - waiting < LONGEST and number + 1 < len(ids):
            continue  # perhaps a part of a character
        found[waiting] = whole[len(decoded(before)) :]
        before, waiting = ids[waiting : number + 1], number + 1
    return found
