"""Persistent knowledge: the common benchmarks, through lm-eval or from files.

The paper's 19 benchmarks fall into 13 that stay when the long-term memory is taken out and 6 that fall (Table 2).
"""

import random
import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field, field_validator

from mosaics.evaluation.example import Example, Prompts, Record
from mosaics.evaluation.files import fields, known_form, read_json, texts
from mosaics.evaluation.harness import run_task
from mosaics.evaluation.results import Row, Suite, grouped, mean, wilson

STAYS, FALLS, OTHER = "first 13", "last 6", "not in the paper"


@dataclass(frozen=True)
class Benchmark:
    """One of the paper's benchmarks, as lm-eval has it.

    Attributes:
        part: which of the paper's two groups it belongs to.
        task: lm-eval's name or configuration; None if only a file will do.
        metric: of lm-eval.
        difference: what is, or may be, different from the paper, which states neither prompts nor shots.
        runs_code: executes what the model writes.
    """

    part: str
    task: str | dict[str, Any] | None
    metric: str
    difference: str = ""
    runs_code: bool = False


BENCHMARKS = {
    "obqa": Benchmark(STAYS, "openbookqa", "acc_norm"),
    "arc-easy": Benchmark(STAYS, "arc_easy", "acc_norm"),
    "winogrande": Benchmark(STAYS, "winogrande", "acc"),
    "arc-challenge": Benchmark(STAYS, "arc_challenge", "acc_norm"),
    "piqa": Benchmark(STAYS, "piqa", "acc_norm"),
    "boolq": Benchmark(STAYS, "boolq", "acc"),
    "hellaswag": Benchmark(STAYS, "hellaswag", "acc_norm"),
    "nq": Benchmark(STAYS, "nq_open", "exact_match", "closed book"),
    "siqa": Benchmark(STAYS, "social_iqa", "acc"),
    "tqa": Benchmark(STAYS, "triviaqa", "exact_match", "closed book"),
    "gsm8k": Benchmark(STAYS, "gsm8k", "exact_match", "strict match"),
    "mmlu-alt": Benchmark(
        STAYS, "mmlu_continuation", "acc", "the paper does not say what alt is; taken as scoring the answers' text"
    ),
    "human-eval+": Benchmark(STAYS, "humaneval_plus", "pass@1", "one greedy sample", runs_code=True),
    "squad": Benchmark(FALLS, "squad_completion", "contains", "lm-eval's cloze form, answer contained"),
    "bbh": Benchmark(FALLS, "bbh_cot_fewshot", "exact_match", "with chains of thought"),
    "math": Benchmark(FALLS, "minerva_math", "exact_match", "Minerva's prompts"),
    "mbpp": Benchmark(FALLS, "mbpp", "pass_at_1", "one greedy sample", runs_code=True),
    "race-middle": Benchmark(
        FALLS, {"task": "race", "dataset_name": "middle"}, "acc", "lm-eval's prompts for race-high, on race-middle"
    ),
    "race-high": Benchmark(FALLS, "race", "acc"),
    "lambada": Benchmark(OTHER, "lambada_openai", "acc"),
    "sciq": Benchmark(OTHER, "sciq", "acc_norm"),
}
_WITHIN_REACH = [name for name, one in BENCHMARKS.items() if one.part != OTHER and not one.runs_code]


class PersistentKnowledge(Suite):
    """The paper's 19 benchmarks (Tables 1, 2 and 9) and two more.

    A benchmark for which a file is given is asked from the file, without lm-eval and without a download; the others are
    left to lm-eval's `hf` model with its prompts, shots and metrics (the table `mapping` says which).

    Attributes:
        data: files by benchmark, as JSON lines: records with `query`, `choices`, `gold` (arc-easy, arc-challenge, piqa,
            obqa, hellaswag, boolq) or in the form of llm-foundry's, OLMo's or the data set's own files (winogrande,
            lambada, tqa, nq, siqa, sciq, mmlu-alt).
        tasks: benchmarks; by default those with a file, or without any file all that run no code.
        samples: questions of each benchmark at most; drawn by the seed from a file, the first ones in lm-eval.
        fewshot: solved questions in front, for benchmarks from files (lm-eval has its own numbers).
        allow_code: lets human-eval+ and mbpp execute what the model writes, on this machine.
        seed: of the draws from files.
    """

    data: dict[str, str] = Field(default_factory=dict)
    tasks: tuple[str, ...] | None = None
    samples: int | None = Field(None, ge=1)
    fewshot: int = Field(0, ge=0)
    allow_code: bool = False
    seed: int = 0

    name: ClassVar[str] = "persistent-knowledge"

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, tasks: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for task in tasks or ():
            if task not in BENCHMARKS:
                raise ValueError(f"there is no benchmark {task}; choose from {', '.join(BENCHMARKS)}")
        return tasks

    @field_validator("data")
    @classmethod
    def _known_data(cls, data: dict[str, str]) -> dict[str, str]:
        for key in data:
            if key not in FORMATS:
                raise ValueError(f"{key} can't be read from a file; these can: {', '.join(FORMATS)}")
        return data

    def sources(self) -> list[str]:
        return list(self.data.values())

    def examples(self, scorer) -> Prompts:
        tasks = self.tasks or tuple(self.data) or tuple(_WITHIN_REACH)
        for task in tasks:
            if BENCHMARKS[task].runs_code and not self.allow_code:
                raise ValueError(f"{task} executes what the model writes; allow that with --allow-code")
        files = {task: self._questions(task) for task in tasks if task in self.data}
        count = sum(len(questions) for _, questions in files.values()) + len(tasks) - len(files)
        return Prompts(count, lambda: self._asked(tasks, files))

    def _questions(self, task: str) -> tuple[str, list[Example]]:
        """Solved questions as a prefix, and the questions to ask."""
        read = FORMATS[task]
        found = []
        with known_form(self.data[task]):
            for number, record in enumerate(read_json(self.data[task])):
                if (example := read(self.data[task], record, f"{task}/{number}")) is not None:
                    texts(example.prompt, *example.references, *(example.choices or ()))
                    found.append(example)
        order = random.Random(f"{task}/{self.seed}").sample(range(len(found)), len(found))
        if len(found) <= self.fewshot:
            raise ValueError(f"{self.data[task]} has {len(found)} questions; ask for fewer --fewshot")
        shown = [found[i] for i in order[: self.fewshot]]
        asked = sorted(order[self.fewshot :][: self.samples])
        return "".join(f"{e.prompt}{e.meta['solution']}\n\n" for e in shown), [found[i] for i in asked]

    def _asked(self, tasks: Sequence[str], files: dict[str, tuple[str, list[Example]]]) -> Iterator[Example]:
        for task in tasks:
            if task in files:
                prefix, questions = files[task]
                for e in questions:
                    meta = {k: v for k, v in e.meta.items() if k != "solution"} | {"task": task, "from": "file"}
                    yield Example(e.id, e.prompt, e.references, e.choices, prefix, e.ending, meta)
            else:
                yield Example(f"lm-eval/{task}", task, [], meta={"task": task, "from": "lm-eval"})

    def answer(self, scorer, examples: Sequence[Example]) -> list[Record]:
        records: dict[str, Record] = {}
        for example in examples:
            if example.meta["from"] == "lm-eval":
                records[example.id] = self._through_lm_eval(scorer, example)
        for how, ask in (("choose", _choose), ("contexts", _contexts), ("complete", _complete), ("word", _word)):
            group = [e for e in examples if e.meta.get("how") == how]
            records |= {record.id: record for record in (ask(scorer, group) if group else [])}
        return [records[example.id] for example in examples]

    def _through_lm_eval(self, scorer, example: Example) -> Record:
        found = run_lm_eval(scorer, BENCHMARKS[example.meta["task"]], self.samples, self.allow_code, self.seed)
        return Record.of(example, None, found.pop("score"), **found)

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        rows: list[Row] = []
        parts: dict[str, list[float]] = {STAYS: [], FALLS: []}
        by_task = grouped(records, "task")
        for task, benchmark in BENCHMARKS.items():
            if (group := by_task.get((task,))) is None:
                continue
            score = mean(record.score for record in group)
            count = sum(record.meta.get("questions", 1) for record in group)
            low, high = wilson(score, count)
            chance = mean(record.meta.get("chance", 0.0) for record in group)
            row = {"benchmark": task, "part": benchmark.part, "from": group[0].meta["from"], "accuracy": 100 * score}
            row |= {"low": 100 * low, "high": 100 * high, "questions": count}
            rows.append(row | {"chance": 100 * chance if row["from"] == "file" else None})
            if benchmark.part in parts:
                parts[benchmark.part].append(100 * score)
        averages = [
            {"average of": part, "accuracy": mean(scores), "benchmarks": len(scores), "of": 13 if part == STAYS else 6}
            for part, scores in [*parts.items()]
            if scores
        ]
        both = parts[STAYS] + parts[FALLS]
        if both:
            averages.append({"average of": "all", "accuracy": mean(both), "benchmarks": len(both), "of": 19})
        asked = [row["benchmark"] for row in rows]
        return {
            "tables": {"benchmarks": rows, "averages": averages, "mapping": mapping(asked)},
            "notes": ["Averages are over benchmarks, in percent; they equal the paper's sets only when all are there."],
        }


def mapping(names: Sequence[str] = tuple(BENCHMARKS)) -> list[Row]:
    """How the paper's benchmarks map to lm-eval, with what differs."""
    rows = []
    for name in names:
        one = BENCHMARKS[name]
        task = one.task if isinstance(one.task, str) else f"{one.task['task']} ({one.task.get('dataset_name')})"
        difference = "; ".join(filter(None, (one.difference, "runs code: on request" if one.runs_code else "")))
        rows.append({"paper": name, "lm-eval": task, "metric": one.metric, "part": one.part, "difference": difference})
    return rows


def run_lm_eval(scorer, benchmark: Benchmark, samples: int | None, allow_code: bool, seed: int) -> dict[str, Any]:
    """One benchmark through lm-eval's `hf` model.

    Returns:
        `score`, `questions`, `metrics` and `samples`, as `mosaics.evaluation.harness.run_task` gives them.

    Raises:
        ValueError: lm-eval is not installed, or its data can't be had.
    """
    try:
        found = run_task(scorer, benchmark.task, samples=samples, allow_code=allow_code, seed=seed)
    except ValueError as error:
        raise ValueError(f"{error}; or give a file with --data") from error
    counts = found["questions"]
    scores = {}
    for name, metrics in found["metrics"].items():
        key = next((key for key in metrics if key.startswith(f"{benchmark.metric},")), None)
        if key is not None and name in counts:
            scores[name] = metrics[key]
    if not scores:
        raise ValueError(f"lm-eval gave no {benchmark.metric} for {benchmark.task}; install the version that is tested")
    total = sum(counts[name] for name in scores)
    score = sum(score * counts[name] for name, score in scores.items()) / total
    return found | {"score": score, "questions": total}


# Questions from files


def _choose(scorer, examples: Sequence[Example]) -> list[Record]:
    records = []
    for example, scores in zip(examples, scorer.choose(examples), strict=True):
        per_character = [score / max(1, len(c.strip())) for score, c in zip(scores, example.choices, strict=True)]
        plain, normed = (
            example.choices[max(range(len(s)), key=s.__getitem__)].strip() for s in (scores, per_character)
        )
        said = normed if BENCHMARKS[example.meta["task"]].metric == "acc_norm" else plain
        right = {"acc": plain == example.references[0], "acc_norm": normed == example.references[0]}
        records.append(Record.of(example, said, said == example.references[0], chance=1 / len(scores), **right))
    return records


def _contexts(scorer, examples: Sequence[Example]) -> list[Record]:
    """The choices are contexts; the same continuation is scored after each."""
    asked = [
        Example(f"{e.id}/{i}", context, [], [e.ending], e.prefix)
        for e in examples
        for i, context in enumerate(e.choices)
    ]
    scores = iter(scorer.choose(asked))
    records = []
    for example in examples:
        _, best = max((next(scores)[0], -i) for i in range(len(example.choices)))
        said = example.choices[-best]
        records.append(Record.of(example, said, said == example.references[0], chance=1 / len(example.choices)))
    return records


def _complete(scorer, examples: Sequence[Example]) -> list[Record]:
    records = []
    for example, said in zip(examples, scorer.complete(examples, 32, stop=["\n"]), strict=True):
        right = normalised(said) in {normalised(reference) for reference in example.references}
        records.append(Record.of(example, said, right))
    return records


def _word(scorer, examples: Sequence[Example]) -> list[Record]:
    """The next word."""
    records = []
    for example, said in zip(examples, scorer.complete(examples, 8), strict=True):
        word = next(iter(re.findall(r"\w+(?:['’-]\w+)*", said)), "")
        records.append(Record.of(example, said, word == example.references[0]))
    return records


def normalised(text: str) -> str:
    """An answer without case, punctuation, articles and extra white space (as SQuAD and TriviaQA compare them)."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _pick(name: str, prompt: str, choices: Sequence[str], gold: int) -> Example:
    """A question with choices that come after a space."""
    choices = [choice.strip() for choice in choices]
    meta = {"how": "choose", "solution": f" {choices[gold]}"}
    return Example(name, prompt, [choices[gold]], [f" {choice}" for choice in choices], meta=meta)


def _write(name: str, prompt: str, answers: Sequence[str]) -> Example:
    return Example(name, prompt, list(answers), meta={"how": "complete", "solution": f" {answers[0]}"})


def _query(ask: str) -> Callable[[str, Any, str], Example]:
    def read(path: str, record: Any, name: str) -> Example:
        query, choices, gold = fields(path, record, "query", "choices", "gold")
        return _pick(name, f"{query.rstrip()}{ask}", choices, gold)

    return read


def _winogrande(path: str, record: Any, name: str) -> Example:
    contexts, continuation, gold = fields(path, record, "context_options", "continuation", "gold")
    meta = {"how": "contexts", "solution": f"{contexts[gold]} {continuation}"}
    return Example(name, "", [contexts[gold]], list(contexts), ending=f" {continuation}", meta=meta)


def _lambada(path: str, record: Any, name: str) -> Example:
    context, word = fields(path, record, "context", "continuation")
    meta = {"how": "word", "solution": f" {word}"}
    return Example(name, context, [word], meta=meta)


def _triviaqa(path: str, record: Any, name: str) -> Example:
    context, answer, aliases = fields(path, record, "context", "answer", "aliases")
    return _write(name, context, list(dict.fromkeys([answer, *aliases])))


def _natural_questions(path: str, record: Any, name: str) -> Example:
    question, answers = fields(path, record, "question", "answer")
    return _write(name, f"Question: {question.rstrip('?')}?\nAnswer:", answers)


def _social_iqa(path: str, record: Any, name: str) -> Example:
    names = ("context", "question", "label", "answerA", "answerB", "answerC")
    context, question, label, *choices = fields(path, record, *names)
    return _pick(name, f"Q: {context} {question}\nA:", choices, int(label) - 1)


def _sciq(path: str, record: Any, name: str) -> Example:
    support, question, right, *others = fields(
        path, record, "support", "question", "correct_answer", "distractor1", "distractor2", "distractor3"
    )
    choices = sorted([right, *others])
    return _pick(name, f"{support}\nQuestion: {question}\nAnswer:".lstrip(), choices, choices.index(right))


def _mmlu(path: str, record: Any, name: str) -> Example | None:
    question, choices, answer = fields(path, record, "question", "choices", "answer")
    if record.get("split", "test") != "test":
        return None
    return _pick(name, f"Question: {question.strip()}\nAnswer:", choices, answer)


FORMATS: dict[str, Callable[[str, Any, str], Example | None]] = {
    "obqa": _query(""),
    "arc-easy": _query("\nAnswer:"),
    "arc-challenge": _query("\nAnswer:"),
    "piqa": _query("\nAnswer:"),
    "hellaswag": _query(""),
    "boolq": _query("\nAnswer:"),
    "winogrande": _winogrande,
    "siqa": _social_iqa,
    "sciq": _sciq,
    "mmlu-alt": _mmlu,
    "tqa": _triviaqa,
    "nq": _natural_questions,
    "lambada": _lambada,
}
