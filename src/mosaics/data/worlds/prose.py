"""The facts of a world as English prose: sentences with capitals and full stops, questions with a line each."""

import re

import numpy as np

from mosaics.data.worlds.vocabulary import ATTRIBUTES, FIRST_NAMES, SECOND_NAMES
from mosaics.data.worlds.world import World

_QUESTION = re.compile(r"so (?:the (?P<a>\w+) of (?P<n>\w+ \w+)|for (?P<m>\w+ \w+) the (?P<b>\w+)) is")
_INVENTED, _ASKED_PLAINLY = 0.35, 0.5  # shares: of documents with words of no list, of questions that say "what"
_SHORTEST = 40
_FACTS = 0.03, 0.06  # of the words of a document, from where to where
_INVENTED_LENGTH = 0.6  # of a document with such words, as a share: they are several tokens each
_VALUES = (value for values in ATTRIBUTES.values() for value in values)
_KNOWN = re.compile(rf"\b(?:{'|'.join(sorted({*FIRST_NAMES, *SECOND_NAMES, *_VALUES}, key=len, reverse=True))})\b")
_ONSETS = "b br d f g gr h k l m n p r s st t v w z".split()
_SYLLABLE = _ONSETS, "aeiou"
_CODAS = ("", "", "n", "r", "l", "s", "m")


def prose(words: str) -> str:
    """Sentences of a world with capitals and without spaces before full stops."""
    return re.sub(r"(?:^|(?<=\. ))[a-z]", lambda found: found[0].upper(), words.replace(" .", "."))


def question(words: str, plainly: bool = False) -> str:
    """What asks for a value, up to where it belongs.

    Args:
        words: a question of the world about a new fact.
        plainly: as "What is the color of …? The color of … is", else as the world has it, "So the color of … is".
    """
    if not plainly:
        return prose(words)
    found = _QUESTION.fullmatch(words)
    what = f"the {found['a'] or found['b']} of {found['n'] or found['m']}"
    return f"What is {what}? T{what[1:]} is"


def invented(rng: np.random.Generator, text: str) -> str:
    """The text with every made-up name and every value replaced by a word of no list, the same one for the same."""
    words: dict[str, str] = {}

    def other(found: re.Match) -> str:
        if found[0] not in words:
            parts = (str(rng.choice(list(kind))) for _ in range(2 + int(rng.random() < 0.25)) for kind in _SYLLABLE)
            made = "".join(parts) + str(rng.choice(_CODAS))
            words[found[0]] = made.capitalize() if found[0][0].isupper() else made
        return words[found[0]]

    return _KNOWN.sub(other, text)


def document(world: World, number: int, most: int = 256, stream: int = 0) -> str:
    """Document `number` of an endless stream: facts about made-up people, sentences about nothing, and questions with
    their answers. In some, names and values are words that occur nowhere else.

    Args:
        world: the world; names are those of its training split.
        number: 0 or more.
        most: words that it has at most, begin-of-text and the words of questions in the world's own form counted.
        stream: seed of the stream.
    """
    rng = np.random.default_rng([world.seed, 2, stream, number])
    is_invented = rng.random() < _INVENTED
    length = int(rng.integers(_SHORTEST, (most * _INVENTED_LENGTH if is_invented else most) + 1))
    facts = max(2, round(length * rng.uniform(*_FACTS)))
    episode = world.episode("new-knowledge", number, length, stream=stream, facts=facts)
    lines = [
        f"{question(' '.join(asked.prompt), bool(rng.random() < _ASKED_PLAINLY))} {asked.answer}.\n"
        for asked in episode.questions
    ]
    text = prose(" ".join(episode.context)) + " \n"[int(rng.integers(2))] + "".join(lines)
    return invented(rng, text) if is_invented else text
