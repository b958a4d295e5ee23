"""transformers' `generate` on an exported mosaic, with what takes a tokenizer."""

from transformers import AutoModelForCausalLM, AutoTokenizer


def test_generate_ends_at_a_stop_string(exported):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    ids = tokenizer("import ", return_tensors="pt").input_ids
    options = dict(max_new_tokens=24, do_sample=False, eos_token_id=None)
    whole = model.generate(ids, **options)[0]
    wanted = tokenizer.decode(whole[ids.shape[1] + 9])
    stopped = model.generate(ids, **options, stop_strings=[wanted], tokenizer=tokenizer)[0]
    assert len(stopped) < len(whole) and whole[: len(stopped)].equal(stopped)
    assert wanted in tokenizer.decode(stopped[ids.shape[1] :])
