"""What the worlds must not be solvable by: predictors without a memory for what goes with what. And two that say how
far a simple look-up in the prompt reaches."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from mosaics.data.worlds.vocabulary import PLAIN_WORDS
from mosaics.data.worlds.world import Episode, World, WorldExample

KERNELS = ((4, 16), (4, 32))  # heads and their width, as in the models of the worlds, and in those of twice their width


class LastWords:
    """Answers from the last words of the prompt alone, as the training episodes answered after them.

    It takes the longest ending, of at most `count` words, that it has counted an answer for.

    Args:
        episodes: of training.
        count: words that it looks at.
    """

    def __init__(self, episodes: Iterable[Episode], count: int = 6) -> None:
        self.count = count
        self.answers: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
        for episode in episodes:
            words = episode.words()
            for place in episode.answer_places():
                for size in range(min(count, place) + 1):
                    self.answers[tuple(words[place - size : place])][words[place]] += 1

    def predict(self, example: WorldExample) -> str:
        """The most frequent of the example's choices after the longest known ending."""
        words = example.prompt.split()
        for size in range(min(self.count, len(words)), -1, -1):
            known = self.answers.get(tuple(words[len(words) - size :]))
            if known and any(choice in known for choice in example.choices):
                return max(example.choices, key=lambda choice: known[choice])
        return example.choices[0]


class WordCounts:
    """Answers with the choice that the prompt has most often (of equal ones, the last named)."""

    def predict(self, example: WorldExample) -> str:
        """The choice."""
        words = example.prompt.split()
        counts, last = Counter(words), {word: place for place, word in enumerate(words)}
        return max(example.choices, key=lambda choice: (counts[choice], last.get(choice, -1)))


class RepeatedEnding:
    """Continues as the prompt did after the longest earlier occurrence of its ending (of equal ones, the latest)."""

    def predict(self, example: WorldExample) -> str:
        """The word that followed; it need not be a choice."""
        words = example.prompt.split()
        best, answer = 0, example.choices[0]
        for place in range(len(words) - 1):
            size = 0
            while size <= place and words[place - size] == words[-1 - size]:
                size += 1
            if size and size >= best:
                best, answer = size, words[place + 1]
        return answer


def naive_bayes(counts: Mapping[str, Counter[str]], words: Sequence[str], smoothing: float, vocabulary: int) -> str:
    """The label whose texts make words likeliest (multinomial, all labels alike); of equally likely ones the first.

    Args:
        counts: of the words by label.
        words: that were asked about.
        smoothing: added to the count of every word.
        vocabulary: different words that there may be.
    """

    def likelihood(label: str) -> float:
        total = counts[label].total() + vocabulary * smoothing
        return sum(np.log((counts[label][word] + smoothing) / total) for word in words)

    return max(counts, key=likelihood)


class LabelledCounts:
    """Naive Bayes over the examples in the prompt: what counting words by label, sentence by sentence, can reach.

    Args:
        smoothing: added to every count, as a share of a word.
    """

    def __init__(self, smoothing: float = 0.1) -> None:
        self.smoothing = smoothing

    def predict(self, example: WorldExample) -> str:
        """The choice whose sentences share most with the question."""
        counts = {choice: Counter() for choice in example.choices}
        for sentence in example.context.split(" . "):
            words = sentence.removesuffix(" .").split()
            for word in words:
                if word in counts:
                    counts[word].update(words)
        return naive_bayes(counts, example.question.split(), self.smoothing, 240)


def _shown(example: WorldExample) -> Iterator[tuple[list[str], str]]:
    """Words and label of every example in the prompt."""
    for sentence in example.context.split(" . "):
        *words, label = sentence.removesuffix(" .").split() or [""]
        if label in example.choices:
            yield words, label


class KernelOverWords:
    """One read of the examples in the prompt by their words, with nothing learnt: the label with the largest sum of
    exp(sharpness cos(a, b)), where a and b are means of random vectors of the words. How far heads of that width reach.

    Args:
        heads: reads, each with word vectors of its own, whose weights are averaged; 0: one read with a dimension for
            every word.
        width: dimensions of a word's vector in each head.
        sharpness: of the kernel; that of several that does best with most examples.
    """

    def __init__(self, heads: int = 0, width: int = 0, sharpness: float = 8.0) -> None:
        self.heads, self.sharpness = heads, sharpness
        count = len(PLAIN_WORDS)
        drawn = np.random.default_rng(0).normal(size=(max(heads, 1), count, width))
        self.vectors = dict(zip(PLAIN_WORDS, drawn.swapaxes(0, 1) if heads else np.eye(count)[:, None], strict=True))

    def _key(self, words: Iterable[str]) -> np.ndarray:
        """Of unit norm, `(heads, width)`."""
        mean = sum(self.vectors[word] for word in words if word in self.vectors)
        return mean / np.linalg.norm(mean, axis=-1, keepdims=True)

    def predict(self, example: WorldExample) -> str:
        """The choice with most weight."""
        shown = list(_shown(example))
        if not shown:
            return example.choices[0]
        keys, labels = [self._key(words) for words, _ in shown], [label for _, label in shown]
        logits = self.sharpness * np.einsum("phw,hw->ph", keys, self._key(example.question.split()))
        weights = np.exp(logits - logits.max(0))
        read: defaultdict[str, float] = defaultdict(float)
        for label, weight in zip(labels, (weights / weights.sum(0)).mean(1), strict=True):
            read[label] += weight
        return max(read, key=lambda label: read[label])


class NearestExamples:
    """Labels of the examples in the prompt that have most words in common with the question: a majority of `count`, the
    nearer first.

    Args:
        count: k.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def predict(self, example: WorldExample) -> str:
        """The choice."""
        asked, found = Counter(example.question.split()), []
        for words, label in _shown(example):
            shared = (asked & Counter(words)).total()
            found.append((shared, len(found), label))  # of equal ones, the latest
        nearest = [label for *_, label in sorted(found, reverse=True)[: self.count]]
        return max(nearest, key=lambda label: (nearest.count(label), -nearest.index(label)), default=example.choices[0])


def predictors(world: World, task: str, training_episodes: int = 500, **settings) -> dict[str, object]:
    """What a model's answers are held against: each offers `predict(example)`. The first two have no memory for what
    goes with what; the others are simple look-ups in the prompt, which recall and classification may be solvable by.

    Args:
        world: the world.
        task: one of `TASKS`.
        training_episodes: that the last-words baseline counts.
        settings: of `World.episode`, for these episodes.
    """
    found = {
        "last_words": LastWords(world.episode(task, number, **settings) for number in range(training_episodes)),
        "word_counts": WordCounts(),
        "repeated_ending": RepeatedEnding(),
    }
    if task == "in-context-learning":
        found |= {"naive_bayes": LabelledCounts()} | {f"nearest_{k}": NearestExamples(k) for k in (1, 5, 15)}
        found |= {"kernel_of_words": KernelOverWords()}
        found |= {f"kernel_{heads}x{width}": KernelOverWords(heads, width) for heads, width in KERNELS}
    return found


def baseline_accuracies(
    world: World, task: str, *, examples: int = 200, training_episodes: int = 500, length: int | None = None, **settings
) -> dict[str, float]:
    """Shares of right answers in the test split, to be reported beside those of a model.

    Args:
        world: the world.
        task: one of `TASKS`.
        examples: questions that are asked.
        training_episodes: episodes of 256 tokens that the last-words baseline counts.
        length: tokens of a test episode.
        settings: further ones of `World.episode`, for the test episodes.

    Returns:
        `chance` (one of the choices), and what each of `predictors` reaches.
    """
    asked = list(world.examples(task, examples, length, **settings))
    accuracies = {"chance": float(np.mean([1 / len(example.choices) for example in asked]))}
    for name, predictor in predictors(world, task, training_episodes).items():
        accuracies[name] = float(np.mean([predictor.predict(example) == example.answer for example in asked]))
    return accuracies
