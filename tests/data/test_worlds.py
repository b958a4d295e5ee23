import re
import zlib
from collections import Counter

import numpy as np
import pytest
import torch

from mosaics.data import PackedDataset, open_corpus, prepare
from mosaics.data.worlds import (
    MIXED,
    TASKS,
    World,
    WorldStream,
    baseline_accuracies,
    open_world,
    world_tokenizer,
)
from mosaics.data.worlds.vocabulary import ATTRIBUTES, FIRST_NAMES, KEYS, LABELS, SECOND_NAMES, VALUES, WORDS

NAME = re.compile(rf"({'|'.join(FIRST_NAMES)}) ({'|'.join(SECOND_NAMES)})\b")
FACTS = [
    re.compile(r"(?<!so )the (?P<attribute>\w+) of (?P<name>\w+ \w+) is (?P<value>\w+) \."),
    re.compile(r"(?<!so )for (?P<name>\w+ \w+) the (?P<attribute>\w+) is (?P<value>\w+) \."),
]
ASKED = [
    re.compile(r"so the (?P<attribute>\w+) of (?P<name>\w+ \w+) is(?: (?P<value>\w+) \.)?"),
    re.compile(r"so for (?P<name>\w+ \w+) the (?P<attribute>\w+) is(?: (?P<value>\w+) \.)?"),
]
WORLD = World(3)
DIGESTS = dict(zip(TASKS, (3527030493, 2217089836, 2820335621, 330604385), strict=True))


def found(patterns, text):
    return [(m["name"], m["attribute"], m["value"]) for p in patterns for m in p.finditer(text)]


def texts(task, split, count=60, world=WORLD, **settings):
    return [world.episode(task, number, split=split, **settings).text() for number in range(count)]


def test_world_tokenizer_is_word_by_word_and_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = world_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for loaded in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert len(loaded) == len(WORDS) == len(set(WORDS)) == WorldStream.vocab_size
        assert [loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id, loaded.unk_token_id] == [0, 1, 2, 3]
        for task in TASKS:
            episode = WORLD.episode(task, 0)
            ids = loaded(episode.text()).input_ids
            assert ids == episode.tokens()[0].tolist() and 3 not in ids
            assert loaded.decode(ids, skip_special_tokens=True) == episode.text()
        assert loaded("the sesquipedalian", add_special_tokens=False).input_ids == [WORDS.index("the"), 3]


def test_attributes_have_172_values_and_none_twice():
    values = [value for values in ATTRIBUTES.values() for value in values]
    assert len(ATTRIBUTES) == 8 and len(values) == len(set(values)) == 172


@pytest.mark.parametrize("task", [*TASKS, MIXED])
@pytest.mark.parametrize("split", ["train", "test"])
def test_world_episode_has_the_asked_length_and_marks_its_answers(task, split):
    for number, length in enumerate([32, 100, 256, 257, 511, 2048] * 3):
        episode = WORLD.episode(task, number, length, split=split)
        ids, answers = episode.tokens()
        assert len(ids) == length == len(answers)
        assert [WORDS[i] for i in ids[answers]] == [q.answer for q in episode.questions]
        assert all(q.answer in q.choices for q in episode.questions)


@pytest.mark.parametrize("task", TASKS)
def test_world_depends_on_its_seed_split_stream_and_number_alone(task):
    def text(seed=1, number=5, **settings):
        return World(seed).episode(task, number, **settings).text()

    # Checked in: the same on every machine and in every process, as long as the worlds stay what they are.
    assert zlib.crc32(text().encode()) == DIGESTS[task]
    others = [text(seed=2), text(number=6), text(stream=1), text(split="test"), text(length=300)]
    assert len({text(), *others}) == 6


def test_new_knowledge_names_and_facts_of_the_test_side_never_occur_in_training():
    train, test = (texts("new-knowledge", split, 300) for split in ("train", "test"))
    names = [{match[0] for text in side for match in NAME.finditer(text)} for side in (train, test)]
    assert min(map(len, names)) > 1000 and not names[0] & names[1]
    known = {match[0] for text in texts("persistent-knowledge", "train") for match in NAME.finditer(text)}
    assert len(known) == 32 and not known & (names[0] | names[1])
    # Both words of a name alone occur on both sides: what is new is the name, not its words.
    assert {word for name in names[0] for word in name.split()} == {*FIRST_NAMES, *SECOND_NAMES}


def test_new_knowledge_asks_stated_facts_once():
    for split in ("train", "test"):
        for number in range(40):
            episode = WORLD.episode("new-knowledge", number, split=split)
            stated = found(FACTS, " ".join(episode.context))
            facts = {(name, attribute): value for name, attribute, value in stated}
            assert len(facts) == len(stated) and (8 <= len(facts) <= 16 if split == "train" else len(facts) == 16)
            asked = [found(ASKED, " ".join(question.prompt))[0][:2] for question in episode.questions]
            assert len(asked) == len(set(asked)) >= 8
            for key, question in zip(asked, episode.questions, strict=True):
                assert facts[key] == question.answer == episode.context[question.fact]
                assert question.choices == ATTRIBUTES[key[1]]
                same = [other for other in facts if other[0] == key[0] or other[1] == key[1]]
                assert question.difficulty == len(same) - 1


def test_new_knowledge_needs_both_words_of_a_name_and_the_attribute():
    shared = Counter()
    for text in texts("new-knowledge", "test", 30):
        facts = found(FACTS, text)
        for name, attribute, _ in facts:
            first, second = name.split()
            shared["first"] += sum(o[0] != name and o[0].split()[0] == first and o[1] == attribute for o in facts) > 0
            shared["second"] += sum(o[0] != name and o[0].split()[1] == second and o[1] == attribute for o in facts) > 0
            shared["attribute"] += sum(o[0] == name and o[1] != attribute for o in facts) > 0
            shared["all"] += 1
    assert all(shared[kind] > 0.5 * shared["all"] for kind in ("first", "second", "attribute"))


def test_persistent_knowledge_is_the_same_everywhere_and_never_asked_from_the_context():
    everywhere = {}
    for split in ("train", "test"):
        for text in texts("persistent-knowledge", split, 100):
            for name, attribute, value in found(FACTS, text) + found(ASKED, text):
                assert everywhere.setdefault((name, attribute), value) == value
            stated = {fact[:2] for fact in found(FACTS, text)}
            assert not stated & {fact[:2] for fact in found(ASKED, text)}
    assert len(everywhere) == 32 * 8


def test_persistent_knowledge_test_also_asks_what_training_only_states():
    train = {fact for text in texts("persistent-knowledge", "train", 150) for fact in found(ASKED, text)}
    stated = {fact for text in texts("persistent-knowledge", "train", 150) for fact in found(FACTS, text)}
    kinds = Counter()
    for number in range(60):
        episode = WORLD.episode("persistent-knowledge", number, split="test")
        for question in episode.questions:
            fact = (*found(ASKED, " ".join(question.prompt))[0][:2], question.answer)
            assert (fact in train) == (question.difficulty == 0) and fact in stated
            kinds[question.difficulty] += 1
    assert 0.15 < kinds[1] / kinds.total() < 0.35


def labelled(words):
    """(words, label) of each example in an episode's words."""
    sentences = [sentence.split() for sentence in " ".join(words).split(" .") if " means " in sentence]
    return [(sentence[-10:-2], sentence[-1]) for sentence in sentences]


@pytest.mark.parametrize("most", [None, 1, 12])
def test_in_context_learning_trains_with_three_shots_of_a_class_or_as_many_as_asked(most):
    own, shots = ({}, 3) if most is None else ({"most_shots": most}, most)
    names = set()
    for number in range(40):
        episode = WORLD.episode("in-context-learning", number, 1280, **own)
        labels = [label for _, label in labelled(episode.words())]
        assert len(labels) == 8 * shots and len(set(labels)) <= 8 and set(labels) <= set(LABELS)
        names.add(episode.id)
    assert len(names) == 40 and names.isdisjoint({WORLD.episode("in-context-learning", 0, 1280, most_shots=2).id})


@pytest.mark.parametrize("settings", [{"length": 256}, {"shots": 2, "split": "test"}])
def test_in_context_learning_has_examples_of_as_many_words_as_asked(settings):
    own = {"noise": 0.0, **settings}
    for words in (1, 3, 11):
        episode = WORLD.episode("in-context-learning", 5, words=words, **own)
        assert len(episode.words()) + 1 == settings.get("length", 1 + (2 * 8 + 8) * (words + 3))
        text = " ".join(episode.words())
        sentences = [sentence.split()[:-2] for sentence in text.split(" .") if " means " in sentence]
        assert len(sentences) > 8 and {len(one) for one in sentences[1:]} == {words}
    eight, plain = (WORLD.episode("in-context-learning", 5, **more, **own) for more in ({"words": 8}, {}))
    assert eight.id == plain.id and eight.text() == plain.text()
    assert WORLD.episode("in-context-learning", 5, words=7, **own).id != plain.id


def test_in_context_learning_does_not_tell_a_label_by_how_often_it_was_there():
    again = []  # whether the next example has the most frequent label so far
    for number in range(300):
        labels = [label for _, label in labelled(WORLD.episode("in-context-learning", number).words())]
        for place in range(12, len(labels)):
            again.append(labels[place] == Counter(labels[:place]).most_common(1)[0][0])
    assert abs(np.mean(again) - 1 / 8) < 4 * (7 / 64 / len(again)) ** 0.5


def test_in_context_learning_asks_with_more_shots_than_it_trains():
    assert (
        max(
            Counter(
                label for _, label in labelled(WORLD.episode("in-context-learning", 0, 2048, split="test").words())
            ).values()
        )
        > 8
    )


def test_in_context_learning_shows_every_class_as_often_as_asked():
    for shots in (0, 1, 32):
        episode = WORLD.episode("in-context-learning", 7, shots=shots, questions=20, split="test")
        counts = Counter(label for _, label in labelled(episode.context))
        assert counts == dict.fromkeys(episode.questions[0].choices, shots) or not shots and not counts
        assert len(episode.questions) == 20 and {example.shots for example in episode.examples()} == {shots}


def test_in_context_learning_labels_mean_something_in_their_prompt_only():
    episodes = [WORLD.episode("in-context-learning", number, shots=32, split="test") for number in range(40)]

    def words_of(episode, label):
        own = [word for words, other in labelled(episode.context) if other == label for word in words]
        return {word for word, _ in Counter(own).most_common(8)}

    again = [
        (words_of(a, label), words_of(b, label))
        for a, b in zip(episodes, episodes[1:], strict=False)
        for label in set(a.questions[0].choices) & set(b.questions[0].choices)
    ]
    assert np.mean([len(a & b) for a, b in again]) < 1  # of 8; by chance 0.27


def test_in_context_learning_noise_is_the_share_of_any_words():
    for noise, low, high in ((0.0, 8, 12), (1.0, 100, 240)):
        episode = WORLD.episode("in-context-learning", 1, shots=32, noise=noise)
        label = episode.questions[0].choices[0]
        words = {word for own, other in labelled(episode.context) if other == label for word in own}
        assert low <= len(words) <= high
        assert {question.difficulty for question in episode.questions} == {noise}


@pytest.mark.parametrize("facts, length", [(1, 32), (24, 256), (90, 2048)])
def test_recall_has_no_accidental_keys(facts, length):
    for split in ("train", "test"):
        for number in range(30):
            episode = WORLD.episode("recall", number, length, split=split, facts=facts)
            counts = Counter(episode.context)
            keys = [word for word in episode.context if word in KEYS]
            assert len(keys) == len(set(keys)) == facts == sum(counts[value] for value in VALUES)
            for question in episode.questions:
                place = episode.context.index(question.prompt[0])
                assert episode.context[place + 1] == question.answer and question.fact == place + 1
            assert len(episode.questions) == facts


def test_recall_pairs_are_drawn_freely_so_that_a_key_says_nothing_of_its_value():
    """What training says goes with a key is right about as often as chance, 1 of 100; not less, as with pairs of which
    each belongs to one split."""
    counts = {"train": Counter(), "test": Counter()}
    for split, found in counts.items():
        for number in range(400):
            for question in WORLD.episode("recall", number, 256, split=split, facts=24).questions:
                found[question.prompt[0], question.answer] += 1
    likeliest = {key: max(VALUES, key=lambda value, key=key: counts["train"][key, value]) for key in KEYS}
    right = sum(counts["test"][pair] for pair in likeliest.items()) / counts["test"].total()
    assert 0.006 < right < 0.014
    seen = sum(n for pair, n in counts["test"].items() if counts["train"][pair])
    assert abs(seen / counts["test"].total() - 0.617) < 0.03  # 1 - e^-0.96: a pair is drawn 0.96 times
    texts = [{WORLD.episode("recall", n, 64, split=split).text() for n in range(200)} for split in counts]
    assert not texts[0] & texts[1]


@pytest.mark.parametrize("task", ["new-knowledge", "recall", "in-context-learning"])
def test_world_examples_measure_the_distance_to_the_answer(task):
    settings = {"shots": 2} if task == "in-context-learning" else {"length": 300}
    examples = list(WORLD.examples(task, 50, **settings))
    assert len(examples) == len({example.id for example in examples}) == 50
    for example in examples:
        words = example.prompt.split()
        assert words[len(words) - example.distance] == example.answer
        assert world_tokenizer()(example.prompt).input_ids == example.prompt_ids
        assert WORDS[example.answer_id] == example.answer
    assert len({example.distance for example in examples}) >= (8 if "shots" in settings else 20)


def test_world_extends_to_eight_times_the_length_and_the_facts():
    episode = WORLD.episode("new-knowledge", 0, 2048, split="test", facts=128)
    assert len(found(FACTS, episode.text())) == 128 and len(episode.questions) > 90
    few = WORLD.episode("new-knowledge", 0, 2048, split="test", facts=16)
    assert len(few.questions) == 16 and max(q.fact for q in few.questions) > 1000 > min(q.fact for q in few.questions)
    assert len(WORLD.episode("new-knowledge", 0, 65536, split="test").tokens()[0]) == 65536


@pytest.mark.parametrize("task", [*TASKS, MIXED])
@pytest.mark.parametrize("loss", ["all", "answers"])
def test_world_stream_rows_depend_on_seed_and_number_alone(task, loss):
    stream = WorldStream(WORLD, task, 200, loss=loss, seed=4)
    whole = stream.batch(6, 6)
    parts = [WorldStream(WORLD, task, 200, loss=loss, seed=4).batch(first, 2) for first in (10, 6, 8)]
    for key in ("input_ids", "document_ids", "labels", "answers"):
        assert torch.equal(whole[key], torch.cat([parts[1][key], parts[2][key], parts[0][key]]))
        assert whole[key].shape == (6, 200)
    assert whole["attention_mask"] is None and not (whole["input_ids"] == 2).any()
    assert not torch.equal(whole["input_ids"], WorldStream(WORLD, task, 200, seed=5).batch(6, 6)["input_ids"])
    assert len({tuple(row) for row in stream.batch(0, 30)["input_ids"].tolist()}) == 30


def test_world_stream_counts_all_tokens_or_answers_only():
    batch = WorldStream(WORLD, "new-knowledge", 256, loss="answers").batch(0, 4)
    values = {WORDS.index(value) for values in ATTRIBUTES.values() for value in values}
    assert set(batch["labels"][batch["answers"]].tolist()) <= values
    assert torch.equal(batch["labels"] != -100, batch["answers"]) and batch["answers"].sum() >= 4 * 8
    everything = WorldStream(WORLD, "new-knowledge", 256).batch(0, 4)
    assert torch.equal(everything["labels"], everything["input_ids"])


def test_baselines_without_a_memory_stay_near_chance():
    new = baseline_accuracies(WORLD, "new-knowledge", examples=100, length=2048, training_episodes=100)
    assert new["last_words"] < 0.12 and new["word_counts"] < 0.2
    short = baseline_accuracies(WORLD, "new-knowledge", training_episodes=100)
    assert short["last_words"] < 0.12 and short["word_counts"] < 0.45  # 16 values, a third of them to choose from
    classes = baseline_accuracies(WORLD, "in-context-learning", shots=4, training_episodes=100)
    assert max(classes["last_words"], classes["word_counts"]) < 0.22 and classes["chance"] == 0.125
    pairs = baseline_accuracies(WORLD, "recall", training_episodes=100)
    assert max(pairs["last_words"], pairs["word_counts"]) < 0.12


def test_baselines_find_what_they_can_find():
    # Where the question has the words of the statement, an ending that repeats is enough: half of the questions.
    new = baseline_accuracies(WORLD, "new-knowledge", examples=100, length=1024, training_episodes=1)
    assert 0.4 < new["repeated_ending"] < 0.65
    assert baseline_accuracies(WORLD, "recall", examples=64, training_episodes=1)["repeated_ending"] == 1
    curve = [
        baseline_accuracies(WORLD, "in-context-learning", shots=shots, training_episodes=1)["naive_bayes"]
        for shots in (1, 4, 16)
    ]
    assert 0.4 < curve[0] < curve[1] < curve[2] and curve[2] > 0.9
    few, many = (baseline_accuracies(WORLD, "in-context-learning", shots=n, training_episodes=1) for n in (1, 16))
    # Narrow heads take words for others; one read that can't reaches what counting does.
    assert few["kernel_4x16"] < few["kernel_4x32"] - 0.04 < few["kernel_of_words"] - 0.08
    assert abs(few["kernel_of_words"] - few["naive_bayes"]) < 0.08 and many["kernel_of_words"] > 0.93
    assert baseline_accuracies(WORLD, "persistent-knowledge", training_episodes=400)["last_words"] > 0.6


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"task": "geography"}, "no task 'geography' in a world"),
        ({"split": "validation"}, "choose train or test"),
        ({"number": -1}, "must be 0 or more"),
        ({"length": 31}, "too short; choose 32 or more"),
        ({"facts": 40}, "40 facts and the questions do not fit into 256 tokens"),
        ({"facts": 16, "questions": 16}, "16 facts and 16 questions do not fit"),
        ({"facts": -1}, "facts is -1"),
        ({"shots": 1}, "new-knowledge has no shots"),
        ({"task": "recall", "facts": 101, "length": 2048}, "more than the 100 keys"),
        ({"task": "persistent-knowledge", "facts": 129, "length": 4096}, "at most 128"),
        ({"task": "in-context-learning", "facts": 1}, "has no facts"),
        ({"task": "in-context-learning", "shots": 1, "length": 256}, "give one of the two"),
        ({"task": "in-context-learning", "noise": 2.0}, "noise is 2.0"),
        ({"task": "in-context-learning", "questions": 24}, "more than the 23"),
        ({"task": "in-context-learning", "most_shots": -1}, "most_shots is -1"),
        ({"most_shots": 5}, "new-knowledge has no most_shots"),
        ({"task": "in-context-learning", "words": 0}, "give words as 1 or more"),
        ({"task": "in-context-learning", "words": -2}, "words is -2"),
        ({"words": 5}, "new-knowledge has no words"),
    ],
)
def test_world_episode_refuses_what_is_impossible(settings, message):
    with pytest.raises(ValueError, match=message):
        WORLD.episode(**{"task": "new-knowledge", "number": 0, **settings})


def test_world_refuses_other_impossible_settings():
    with pytest.raises(ValueError, match="seed -1 is negative"):
        World(-1)
    with pytest.raises(ValueError, match="choose all or answers"):
        WorldStream(WORLD, "recall", 256, loss="some")
    with pytest.raises(ValueError, match="no setting 'shotz'; choose from facts, questions, shots, noise"):
        WorldStream(WORLD, "recall", 256, shotz=3)
    with pytest.raises(ValueError, match="no setting 'split'"):
        WorldStream(WORLD, "recall", 256, split="test")
    with pytest.raises(ValueError, match="0 rows from 0"):
        WorldStream(WORLD, "recall", 256).batch(0, 0)
    with pytest.raises(ValueError, match="do not fit"):
        WorldStream(WORLD, "recall", 64, facts=90)


def test_open_corpus_world_gives_training_episodes_as_documents():
    corpus = open_corpus("world:new-knowledge,documents=7,tokens=128,seed=3,stream=2")
    documents = list(corpus)
    assert documents == list(corpus) and len(documents) == 7
    assert [document.id for document in documents] == sorted(document.id for document in documents)
    assert documents[4].text == WORLD.episode("new-knowledge", 4, 128, stream=2).text()


@pytest.mark.parametrize(
    "spec, message",
    [
        ("world:new-knowlege", "did you mean new-knowledge"),
        ("world:", "no world ''"),
        ("world:mixed,document=3", "is no setting of a world"),
        ("world:mixed,documents=few", "KEY=NUMBER"),
        ("world:mixed,documents=0", "has no documents"),
        ("world:recall,tokens=8", "too short"),
    ],
)
def test_open_world_refuses_unknown_names_and_settings(spec, message):
    with pytest.raises(ValueError, match=message):
        open_world(spec)


@pytest.mark.parametrize("tokenizer", [None, "world"])
def test_prepare_takes_a_world(tmp_path, tokenizer):
    tokenizer = world_tokenizer() if tokenizer else None
    corpus = "world:mixed,documents=40,tokens=64"
    report = prepare(corpus, tmp_path / "data", tokenizer=tokenizer, vocab_size=600, validation=0.1)
    assert sum(counts.documents for counts in report.splits.values()) == 40
    if tokenizer:
        assert all(counts.tokens == counts.documents * 65 for counts in report.splits.values())  # with end-of-text
        row = PackedDataset(tmp_path / "data", "train", 65).batch(0, 1)["input_ids"][0]
        texts = {document.text for document in open_corpus(corpus)}
        assert tokenizer.decode(row, skip_special_tokens=True) in texts
