"""lm-eval's `hf` model on an exported mosaic: any batch gives what one by one gives, and what the model itself says."""

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from mosaics import MosaicForCausalLM

PROMPTS = ["def", "import heapq\n\nheap = []\nheapq.heappush(heap, ", "class TextWrapper:", "x = [1, 2, 3]\nfor"]
CONTINUATIONS = [" insort(a, x):", "1)", '\n    """', " i in range(len(x)):\n        pass"]


@pytest.fixture(scope="module")
def harness(exported):
    """Makes lm-eval's model for a batch size."""
    return lambda batch_size: HFLM(pretrained=str(exported), device="cpu", dtype="float32", batch_size=batch_size)


@pytest.fixture(scope="module")
def model(exported) -> MosaicForCausalLM:
    return AutoModelForCausalLM.from_pretrained(exported).eval()


@pytest.fixture(scope="module")
def tokenizer(exported):
    return AutoTokenizer.from_pretrained(exported)


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


@torch.no_grad()
def log_probability(model, prefix: list[int], targets: list[int]) -> float:
    """The sum over `targets` after `prefix`, from a plain pass over one row."""
    ids = torch.tensor([[*prefix, *targets]])
    scores = model(ids, use_cache=False).logits[0, len(prefix) - 1 : -1].double().log_softmax(-1)
    return scores.gather(1, torch.tensor(targets)[:, None]).sum().item()


def test_lm_eval_finds_the_training_context(harness):
    assert harness(1).max_length == 64


def test_lm_eval_loglikelihood_in_a_batch_equals_one_by_one_and_the_model(harness, model):
    asked = requests("loglikelihood", list(zip(PROMPTS, CONTINUATIONS, strict=True)))
    together = harness(4)
    batched = [score for score, _ in together.loglikelihood(asked, disable_tqdm=True)]
    single = [score for score, _ in harness(1).loglikelihood(asked, disable_tqdm=True)]
    assert batched == pytest.approx(single, abs=1e-4)
    expected = [log_probability(model, *together._encode_pair(*request.args)) for request in asked]
    assert batched == pytest.approx(expected, abs=1e-4)


def test_lm_eval_loglikelihood_rolling_equals_the_sum_over_windows(harness, model, tokenizer, texts):
    text = texts[3]
    ids = tokenizer.encode(text)
    assert len(ids) > 2 * 64  # several windows
    asked = requests("loglikelihood_rolling", [(text,), (PROMPTS[1],)])
    batched = harness(3).loglikelihood_rolling(asked, disable_tqdm=True)
    assert batched == pytest.approx(harness(1).loglikelihood_rolling(asked, disable_tqdm=True), abs=1e-3)
    # A window of 64 predictions begins with the token before it; the last one is moved back to be full.
    stream, expected = [tokenizer.bos_token_id, *ids], 0.0
    for begin in range(0, len(ids), 64):
        end = min(begin + 64, len(ids))
        first = 0 if begin == 0 else end - 64
        expected += log_probability(model, stream[first : begin + 1], stream[begin + 1 : end + 1])
    assert batched[0] == pytest.approx(expected, abs=1e-3)


def test_lm_eval_generate_until_with_left_padding_equals_one_by_one(harness, model, tokenizer):
    options = {"until": ["\n\n\n\n"], "max_gen_toks": 12, "do_sample": False}
    asked = requests("generate_until", [(prompt, options) for prompt in PROMPTS])
    batched = harness(4).generate_until(asked, disable_tqdm=True)
    assert batched == harness(1).generate_until(asked, disable_tqdm=True)
    for prompt, answer in zip(PROMPTS, batched, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        for _ in range(12):  # greedily, without a cache
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        assert answer == tokenizer.decode(ids[0, -12:], skip_special_tokens=True)
