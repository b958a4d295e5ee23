"""Answers that are written together are those that each gets alone; nobody waits for what nobody wants."""

import threading
import time
from queue import Queue

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from mosaics.models.memory_file import read_context
from mosaics.serving import engine as module
from mosaics.serving.answer import Answer, Sampling
from mosaics.serving.engine import Engine, Job, ShuttingDown

PROMPTS = [list(range(3, 3 + length)) for length in (1, 40, 7, 100, 2, 300, 30, 9)]


class Desk:
    """Submits jobs and collects what they are told."""

    def __init__(self, model, tokenizer, parallel=16):
        self.calls: list[tuple[int, int]] = []  # shapes of what the model was given
        self.tokenizer, self.told = tokenizer, Queue()
        self.handle = model.register_forward_pre_hook(
            lambda _, args, kwargs: self.calls.append(tuple((args or (kwargs["input_ids"],))[0].shape)),
            with_kwargs=True,
        )
        self.engine = Engine(model, parallel)

    def submit(self, ids, n=1, before=None, seconds=100.0, **sampling):
        answers = [Answer(self.tokenizer, frozenset(), Sampling(**{"temperature": 0.0} | sampling)) for _ in range(n)]
        job = Job(torch.tensor([ids]), answers, before, None, time.monotonic() + seconds)
        job.tell = lambda number, what: self.told.put((job, number, what))
        self.engine.submit(job)
        return job

    def next(self):
        return self.told.get(timeout=60)

    def finish(self, *jobs):
        """Waits until every answer of the jobs has ended; gives their tokens."""
        open_answers = sum(len(job.answers) for job in jobs)
        while open_answers:
            _, number, what = self.next()
            assert number is not None, what
            open_answers -= what.finish_reason is not None
        return [answer.tokens for job in jobs for answer in job.answers]


@pytest.fixture
def desk(loaded):
    made = []

    def make(model=None, **options):
        made.append(Desk(model or loaded[0], loaded[1], **options))
        return made[-1]

    yield make
    for one in made:
        one.engine.close(0)
        one.engine.join()
        one.handle.remove()


def test_engine_answers_together_equal_each_alone(desk, greedy):
    expected = [greedy(ids, 24) for ids in PROMPTS]
    here = desk()
    assert here.finish(*(here.submit(ids, max_tokens=24) for ids in PROMPTS)) == expected
    steps = [rows for rows, time in here.calls if time == 1]
    assert max(steps) >= 4 and len(steps) < 8 * 24 / 2  # most of them were rows of one batch


def test_engine_keeps_contexts_of_very_different_lengths_apart(desk, loaded, monkeypatch):
    monkeypatch.setattr(module, "SLACK", 16)
    here = desk()
    tried, joined = {True: [], False: []}, here.engine._joined

    def watched(batch, new):
        lengths, done = batch.lengths + new.lengths, joined(batch, new)
        tried[done].append(max(lengths) - 2 * min(lengths))
        return done

    here.engine._joined = watched
    here.finish(*(here.submit(ids, max_tokens=12) for ids in PROMPTS))
    assert max(tried[True]) <= 16 < min(tried[False])


def test_engine_goes_on_from_what_comes_before_and_leaves_it(desk, loaded, greedy):
    here, context = desk(), list(range(5, 125))
    before = read_context(loaded[0], torch.tensor([context]))
    for _ in range(2):
        jobs = [here.submit(ids, before=before, max_tokens=10) for ids in PROMPTS[:3]]
        jobs.append(here.submit(PROMPTS[3], max_tokens=10))
        assert here.finish(*jobs) == [greedy(context + ids, 10) for ids in PROMPTS[:3]] + [greedy(PROMPTS[3], 10)]
    assert before.get_seq_length() == 120


def test_engine_reads_a_prompt_once_for_several_answers(desk):
    here = desk()
    job = here.submit(PROMPTS[3], n=3, max_tokens=9, temperature=1.0)
    here.finish(job)
    assert here.calls[0] == (1, 100) and set(here.calls[1:]) == {(3, 1)} and len(here.calls) == 9


def test_engine_gives_the_cache_where_no_answer_is_asked_for(desk, loaded):
    here, ids = desk(), torch.tensor([list(range(3, 63)) * 10])
    job = Job(ids, [], None, lambda number, what: here.told.put((job, number, what)), time.monotonic() + 100)
    here.engine.submit(job)
    _, number, cache = here.next()
    assert number is None and isinstance(cache, DynamicCache) and cache.get_seq_length() == 600
    with torch.no_grad():
        expected = loaded[0](torch.cat([ids, ids[:, :5]], dim=1)).logits[:, -5:]
        torch.testing.assert_close(loaded[0](ids[:, :5], past_key_values=cache).logits, expected)


def test_engine_reads_prompts_in_turns(desk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 16)
    here = desk()
    long = here.submit(PROMPTS[5] * 3, max_tokens=1)
    short = [here.submit(ids, max_tokens=5) for ids in PROMPTS[:1]]
    here.finish(*short)
    assert not long.answers[0].tokens and not long.over
    here.finish(long)


def test_engine_gives_up_a_job_that_is_over(desk):
    here = desk()
    job, other = here.submit([5, 6], max_tokens=10**6), here.submit([7, 8], max_tokens=10**6)
    for _ in range(10):
        here.next()
    job.over = True
    time.sleep(0.5)
    written = len(job.answers[0].tokens)
    time.sleep(0.5)
    assert len(job.answers[0].tokens) == written
    before = len(other.answers[0].tokens)
    other.over = True
    time.sleep(0.5)
    calls = len(here.calls)
    time.sleep(0.5)
    assert len(here.calls) == calls and before > written // 2
    assert not (here.engine._waiting or here.engine._reading or here.engine._batches)


def test_engine_tells_when_the_time_is_over(desk):
    here = desk(parallel=1)
    first, second = here.submit([5, 6], max_tokens=10**6, seconds=1.0), here.submit([7, 8], max_tokens=3, seconds=0.5)
    told = []
    while len(told) < 2:
        job, number, what = here.next()
        if number is None:
            told.append((job, type(what)))
    assert told == [(second, TimeoutError), (first, TimeoutError)]  # one while it waited, one while it was written
    here.finish(here.submit([7, 8], max_tokens=3))


def test_engine_never_writes_more_than_it_may(desk):
    here, busy = desk(parallel=3), []
    admit = here.engine._admit

    def watched():
        admit()
        rows = [job.rows for job in here.engine._reading] + [len(batch.rows) for batch in here.engine._batches]
        busy.append(sum(rows))

    here.engine._admit = watched
    many = zip(PROMPTS, [1, 3, 2, 1, 1, 2, 1, 3], strict=True)
    here.finish(*[here.submit(ids, n=n, max_tokens=7, temperature=1.0) for ids, n in many])
    assert max(busy) == 3


def test_engine_tells_of_a_failure_and_goes_on(desk, loaded, greedy):
    here = desk()
    broken = here.submit([loaded[0].config.vocab_size + 5], max_tokens=3)
    fine = here.submit([5, 6], max_tokens=5)
    told = [here.next() for _ in range(1)]
    while told[-1][2] is not None and not (told[-1][0] is fine and getattr(told[-1][2], "finish_reason", None)):
        told.append(here.next())
    (failure,) = [what for job, number, what in told if job is broken]
    assert isinstance(failure, ValueError)
    assert fine.answers[0].tokens == greedy([5, 6], 5)


def test_engine_tells_all_answers_of_a_batch_that_fails(desk, loaded, monkeypatch):
    here = desk()
    jobs = [here.submit([5, 6, n], max_tokens=10**6) for n in (7, 8)]
    for _ in range(20):
        here.next()
    whole = here.engine._logits

    def fails(ids, cache):
        if ids.shape == (2, 1):
            raise RuntimeError("can't allocate memory")
        return whole(ids, cache)

    monkeypatch.setattr(here.engine, "_logits", fails)
    told = {}
    while len(told) < 2:
        job, number, what = here.next()
        if number is None:
            told[job] = what
    assert set(told) == set(jobs) and all(isinstance(what, RuntimeError) for what in told.values())
    here.finish(here.submit([5, 6], max_tokens=3))


def test_engine_tells_of_a_failure_between_tokens_and_goes_on(desk, monkeypatch):
    here = desk()
    job = here.submit([5, 6], n=2, max_tokens=10**6)
    here.next()
    monkeypatch.setattr(here.engine, "_prune", lambda batch: (_ for _ in ()).throw(RuntimeError("out of memory")))
    while (told := here.next())[1] is not None:
        pass
    assert told[0] is job and isinstance(told[2], RuntimeError) and here.engine.alive
    monkeypatch.undo()
    here.finish(here.submit([5, 6], max_tokens=3))


def test_engine_close_lets_jobs_end_and_tells_those_that_do_not(desk):
    here = desk()
    short, long = here.submit([5, 6], max_tokens=5), here.submit([7, 8], max_tokens=10**6)
    here.next()
    here.engine.close(1.5)
    here.engine.join()
    told = [here.told.get() for _ in range(here.told.qsize())]
    assert [what.finish_reason for job, _, what in told if job is short][-1] == "length"
    assert isinstance([what for job, _, what in told if job is long][-1], ShuttingDown)
    assert not here.engine.alive


def test_engine_close_while_idle_ends_at_once(desk):
    here, begin = desk(), time.monotonic()
    here.engine.close(60)
    here.engine.join()
    assert time.monotonic() - begin < 5


def test_engine_answers_for_a_model_that_is_no_mosaic(desk, loaded):
    torch.manual_seed(0)
    size = len(loaded[1])
    config = LlamaConfig(
        vocab_size=size, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    llama = LlamaForCausalLM(config).double().eval()
    here = desk(llama)
    jobs = [here.submit(ids, n=2, max_tokens=8) for ids in PROMPTS[1:5]]
    found = here.finish(*jobs)
    for i, ids in enumerate(PROMPTS[1:5]):
        options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
        expected = llama.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
        assert found[2 * i] == found[2 * i + 1] == expected


def test_engine_has_one_thread(desk):
    before = threading.active_count()
    here = desk()
    here.finish(*(here.submit(ids, max_tokens=2) for ids in PROMPTS))
    assert threading.active_count() == before + 1
