"""A world as a corpus: episodes of its training split, a document each."""

from collections.abc import Iterator
from difflib import get_close_matches

from mosaics.data.document import Corpus, Document
from mosaics.data.worlds import prose
from mosaics.data.worlds.world import MIXED, TASKS, World

WORLD = "world:"  # a corpus of its name
PROSE = "prose"

_DEFAULTS = {"documents": 4000, "tokens": 256, "seed": 0, "stream": 0}


def open_world(spec: str) -> Corpus:
    """Opens a world as a corpus.

    Args:
        spec: `world:NAME`, with one of `TASKS`, `mixed` or `prose` (new facts in English sentences, with questions; see
            `mosaics.data.worlds.prose`) as the name; settings may follow, such as
            `world:mixed,documents=500,tokens=128,seed=1`: how many documents (4000), words in each, begin-of-text
            counted (256), the seed of the world (0) and that of the stream of episodes (0).

    Raises:
        ValueError: an unknown name or setting, or a value that is out of range.
    """
    task, *words = spec.removeprefix(WORLD).split(",")
    known = (*TASKS, MIXED, PROSE)
    if task not in known:
        near = get_close_matches(task, known, n=1, cutoff=0.4)
        raise ValueError(f"there is no world {task!r}; {'did you mean' if near else 'take'} {(near or known)[0]}?")
    settings = dict(_DEFAULTS)
    for word in words:
        key, _, value = word.partition("=")
        if key not in settings or not value.isdecimal():
            raise ValueError(f"{word!r} is no setting of a world; write one of {', '.join(settings)} as KEY=NUMBER")
        settings[key] = int(value)
    world, count = World(settings["seed"]), settings["documents"]
    if count < 1:
        raise ValueError(f"{spec} has no documents; ask for 1 or more")

    def document(number: int) -> Document:
        if task == PROSE:
            return Document(f"{number:08d}", prose.document(world, number, settings["tokens"], settings["stream"]))
        episode = world.episode(task, number, settings["tokens"], stream=settings["stream"])
        return Document(f"{number:08d}", episode.text())

    document(0)  # says at once what does not fit

    def documents() -> Iterator[Document]:
        return map(document, range(count))

    return Corpus(spec, documents)
