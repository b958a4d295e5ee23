"""The words of the synthetic worlds, and the word-level tokenizer that knows them. The same for every seed."""

from functools import lru_cache
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mosaics.data.tokenizer import BEGIN_OF_TEXT, END_OF_TEXT, PAD

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

UNKNOWN = "<|unknown|>"
_SPECIAL = (BEGIN_OF_TEXT, END_OF_TEXT, PAD, UNKNOWN)

# Eight attributes with 172 values in all; no value belongs to two attributes.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    name: tuple(values.split())
    for name, values in {
        "color": "red blue green yellow purple orange brown black white gray pink crimson scarlet azure violet amber "
        "indigo teal beige ivory maroon turquoise",
        "trade": "baker weaver potter smith tailor mason carpenter farmer fisher painter cobbler glazier cooper tanner "
        "brewer printer barber doctor lawyer sailor shepherd saddler",
        "pet": "dog cat parrot rabbit hamster ferret pony goat turtle lizard falcon canary goldfish hedgehog raven owl "
        "spaniel piglet lamb gecko toad duckling",
        "dish": "soup stew bread porridge pancakes dumplings noodles rice salad omelette cheese pudding pie sausage "
        "curry pasta risotto beans toast waffles chowder goulash",
        "tool": "hammer saw chisel plane file rasp drill wrench pliers shovel rake hoe axe sickle needle compass ruler "
        "trowel mallet anvil crowbar",
        "game": "chess checkers dominoes poker bridge darts tennis cricket hockey rugby golf bowling croquet billiards "
        "archery fencing marbles skittles charades hopscotch polo",
        "tree": "oak elm birch maple willow cedar pine spruce larch poplar beech chestnut walnut hazel alder cypress "
        "yew juniper sycamore rowan linden",
        "instrument": "violin cello flute oboe clarinet bassoon trumpet trombone tuba harp piano organ guitar lute "
        "mandolin banjo drum tambourine zither accordion fiddle",
    }.items()
}

# Made-up names have two words: one of 100 first ones and one of 100 second ones.
FIRST_NAMES = tuple(
    a + b for a in "Bal Dor Fen Gal Hel Jor Kel Mar Nor Tam".split() for b in "a ena ick imo o on osh uda ul y".split()
)
SECOND_NAMES = tuple(
    a + b
    for a in "Ach Brin Crav Dusk Eld Grim Harl Lorn Oster Pell".split()
    for b in "ard back dale er field ing ley man son wick".split()
)
NAME_WORDS = len(FIRST_NAMES)

# Words without meaning: those of the classes, and the keys and values of the recall episodes.
PLAIN_WORDS = tuple(
    a + b + c
    for a in "b d f g k l m n p s t v".split()
    for b in ("a", "e", "i", "o", "u")
    for c in ("lix", "mup", "rond", "zet")
)
KEYS, VALUES = PLAIN_WORDS[:100], PLAIN_WORDS[100:200]
LABELS = tuple(f"class_{number:02d}" for number in range(16))

NOUNS = tuple("road river hill house garden window door cloud field wall gate market tower stone wind".split())
ADJECTIVES = tuple("old new quiet small large narrow wide bright dark cold warm distant empty".split())
VERBS = tuple("stands waits rests changes fades remains turns shines begins ends".split())
ADVERBS = tuple("slowly often again today always soon meanwhile still".split())
FILLERS = NOUNS + ADJECTIVES + VERBS + ADVERBS
_OTHER = (".", "the", "of", "for", "so", "is", "near", "someone", "means")

WORDS: tuple[str, ...] = (
    *_SPECIAL,
    *_OTHER,
    *FILLERS,
    *ATTRIBUTES,
    *(value for values in ATTRIBUTES.values() for value in values),
    *FIRST_NAMES,
    *SECOND_NAMES,
    *LABELS,
    *PLAIN_WORDS,
)
WORD_IDS: dict[str, int] = {word: number for number, word in enumerate(WORDS)}


@lru_cache(maxsize=1)
def _backend() -> Tokenizer:
    backend = Tokenizer(models.WordLevel(WORD_IDS, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN_OF_TEXT} $A", special_tokens=[(BEGIN_OF_TEXT, WORD_IDS[BEGIN_OF_TEXT])]
    )
    return backend


def world_tokenizer() -> "PreTrainedTokenizerFast":
    """The tokenizer of all worlds: a word a token, split at white space; encoding puts begin-of-text first.

    Returns:
        The tokenizer, with `<|begin_of_text|>` 0, `<|end_of_text|>` 1, `<|pad|>` 2 and `<|unknown|>` 3 for words
        of no world; pads on the left. Decoding gives the words back with one space between them.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=_backend(),
        bos_token=BEGIN_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
