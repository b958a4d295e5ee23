"""A server process, asked by OpenAI's own client."""

import http.client
import json
import re
from pathlib import Path

import openai
import pytest
import torch

from mosaics.cli import main
from serving.conftest import DOCUMENT

GREEDY = dict(temperature=0, max_tokens=12)


def said(client, prompt="import ", **options):
    return client.completions.create(**{"model": "tiny", "prompt": prompt} | GREEDY | options)


def chatted(client, *messages, **options):
    roles = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(messages)]
    return client.chat.completions.create(**{"model": "tiny", "messages": roles} | GREEDY | options)


def generated(loaded, greedy, text, tokens=12, special=True):
    """What `generate` writes after a text."""
    tokenizer = loaded[1]
    written = greedy(tokenizer(text, add_special_tokens=special).input_ids, tokens)
    return tokenizer.decode(written, skip_special_tokens=True), len(written)


def raw(server, method, path, body=None, headers=None):
    """Status, headers and body of a request that no client library would send."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    try:
        connection.request(method, path, body, {"content-type": "application/json"} | (headers or {}))
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def posted(server, path, **fields):
    status, _, body = raw(server, "POST", path, json.dumps(fields))
    return status, json.loads(body)


def test_models_are_the_one_that_is_served(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "mosaics"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'.*has 'tiny'"):
        client.models.retrieve("other")


def test_completion_equals_generate(client, loaded, greedy):
    answer = said(client)
    text, written = generated(loaded, greedy, "import ")
    (choice,) = answer.choices
    assert choice.text == text and choice.finish_reason == "length" and choice.index == 0
    read = len(loaded[1]("import ").input_ids)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (read, written)
    assert answer.usage.total_tokens == read + written and answer.model == "tiny"
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")


def test_completion_answers_every_prompt_n_times(client, loaded, greedy):
    prompts = ["import ", "def f(x):\n", "class Heap"]
    answer = said(client, prompts, n=2)
    expected = [generated(loaded, greedy, text)[0] for text in prompts for _ in range(2)]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage.prompt_tokens == sum(len(loaded[1](text).input_ids) for text in prompts)
    assert answer.usage.completion_tokens == 72


def test_completion_takes_tokens(client, loaded, greedy):
    ids = loaded[1](["import ", "def f"]).input_ids
    for prompt, rows in ((ids, ids), (ids[0], ids[:1])):
        assert [c.text for c in said(client, prompt).choices] == [
            loaded[1].decode(greedy(row, 12), skip_special_tokens=True) for row in rows
        ]


def test_completion_streamed_equals_the_whole(client):
    whole = said(client, ["import ", "def f"], n=2, temperature=1, seed=3)
    stream = said(client, ["import ", "def f"], n=2, temperature=1, seed=3, stream=True)
    texts, reasons, chunks = [""] * 4, [None] * 4, 0
    for chunk in stream:
        (choice,) = chunk.choices
        assert reasons[choice.index] is None and chunk.usage is None
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason
        chunks += 1
    assert texts == [choice.text for choice in whole.choices] and reasons == ["length"] * 4 and chunks > 12


@pytest.mark.parametrize("ask", [said, chatted])
def test_stream_says_what_was_used_when_asked(client, ask):
    whole = ask(client, "import ").usage
    *chunks, last = ask(client, "import ", stream=True, stream_options={"include_usage": True})
    assert last.usage == whole and last.choices == [] and all(chunk.usage is None for chunk in chunks)


def test_seed_repeats_and_answers_differ(client):
    draw = dict(temperature=1, n=3)
    first, again, other = ([choice.text for choice in said(client, seed=seed, **draw).choices] for seed in (5, 5, 6))
    assert first == again != other and len(set(first)) == 3
    assert first[1] == said(client, seed=6, temperature=1).choices[0].text  # the n-th answer has the n-th seed
    assert said(client, **draw).choices != said(client, **draw).choices


def test_stop_ends_before_the_text(client):
    whole = said(client, max_tokens=40).choices[0].text
    stop = whole[20:23]
    expected = whole[: whole.index(stop)]
    for options in (dict(stop=stop), dict(stop=["never there", stop])):
        answer = said(client, max_tokens=40, **options)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected, "stop")
        assert answer.usage.completion_tokens < 40
    *_, last = chunks = list(said(client, max_tokens=40, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected and last.choices[0].finish_reason == "stop"


def test_end_of_text_ends_an_answer(client, loaded):
    drawn = (said(client, max_tokens=40, temperature=2, seed=seed) for seed in range(300))
    answer = next(answer for answer in drawn if answer.choices[0].finish_reason == "stop")
    assert answer.usage.completion_tokens < 40 and loaded[1].eos_token not in answer.choices[0].text


def test_logprobs_are_those_of_the_model(client, loaded):
    model, tokenizer = loaded
    answer = said(client, logprobs=2, max_tokens=5).choices[0].logprobs
    chat = chatted(client, "hi", logprobs=True, top_logprobs=2, max_tokens=5).choices[0].logprobs.content
    for text, found in (
        ("import ", list(zip(answer.tokens, answer.token_logprobs, strict=True))),
        ("[user] hi\n[assistant] ", [(one.token, one.logprob) for one in chat]),
    ):
        ids = tokenizer(text, return_tensors="pt").input_ids
        for token, logprob in found:
            with torch.no_grad():
                expected = model(ids).logits[0, -1].log_softmax(-1)
            best = expected.argmax()
            assert token == tokenizer.decode([best]) and logprob == pytest.approx(expected[best].item(), abs=1e-4)
            ids = torch.cat([ids, best[None, None]], dim=1)
    assert all(len(one.top_logprobs) == 2 and one.top_logprobs[0].logprob == one.logprob for one in chat)
    assert all(max(top.values()) == own for top, own in zip(answer.top_logprobs, answer.token_logprobs, strict=True))
    assert said(client, logprobs=0).choices[0].logprobs.top_logprobs is None
    streamed = [c.choices[0].logprobs for c in said(client, logprobs=2, max_tokens=5, stream=True)]
    assert [token for part in streamed for token in part.tokens] == answer.tokens


def test_chat_equals_generate_after_the_template(client, loaded, greedy):
    expected = generated(loaded, greedy, "[user] hi\n[assistant] yes\n[user] more\n[assistant] ")[0]
    answer = chatted(client, "hi", "yes", "more")
    assert answer.choices[0].message.content == expected and answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    parts = [{"type": "text", "text": "mo"}, {"type": "text", "text": "re"}]
    assert chatted(client, "hi", "yes", parts).choices[0].message.content == expected
    first, *chunks = chatted(client, "hi", "yes", "more", stream=True)
    assert first.choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    expected = generated(loaded, greedy, "[system] be brief\n[user] hi\n[assistant] ", 5)[0]
    found = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_completion_tokens=5)
    assert found.choices[0].message.content == expected


def test_completion_with_a_memory_equals_generate_with_it(client, server, exported, kept, loaded, capsys):
    made = client.post("/memories", body={"text": DOCUMENT}, cast_to=object)
    assert made["tokens"] == len(loaded[1](DOCUMENT).input_ids) and made["bytes"] > 0 and not made["given"]
    prompts = ["def ", "import os, sys\nclass "]
    capsys.readouterr()
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    more = ["--memory", str(kept), "--temperature", "0", "--max-new-tokens", "30"]
    expected = []
    for prompt in prompts:
        assert main(["generate", str(exported), "--prompt", prompt, *more]) == 0
        expected.append(capsys.readouterr().out.removeprefix(prompt).removesuffix("\n"))
    assert words and expected[0] != said(client, "def ", max_tokens=30).choices[0].text
    for id in (made["id"], "doc"):
        answer = said(client, prompts, max_tokens=30, extra_body={"memory": id})
        assert [choice.text for choice in answer.choices] == expected
        assert answer.usage.prompt_tokens_details.cached_tokens == 2 * made["tokens"]
    client.delete(f"/memories/{made['id']}", cast_to=object)


def test_chat_with_a_memory_puts_the_conversation_behind_it(client, loaded, greedy):
    tokenizer = loaded[1]
    ids = tokenizer(DOCUMENT).input_ids + tokenizer("[user] hi\n[assistant] ", add_special_tokens=False).input_ids
    answer = chatted(client, "hi", extra_body={"memory": "doc"})
    assert answer.choices[0].message.content == tokenizer.decode(greedy(ids, 12), skip_special_tokens=True)


def test_memory_of_more_than_one_text(client, loaded, greedy):
    tokenizer = loaded[1]
    first = client.post("/memories", body={"text": "import os\n"}, cast_to=object)
    both = client.post("/memories", body={"text": "import sys\n", "memory": first["id"]}, cast_to=object)
    texts = ["import os\n", "import sys\n", "def "]
    ids = [token for i, text in enumerate(texts) for token in tokenizer(text, add_special_tokens=i == 0).input_ids]
    answer = said(client, "def ", extra_body={"memory": both["id"]})
    assert answer.choices[0].text == tokenizer.decode(greedy(ids, 12), skip_special_tokens=True)
    listed = {one["id"]: one for one in client.get("/memories", cast_to=object)["data"]}
    assert listed[both["id"]] == both == client.get(f"/memories/{both['id']}", cast_to=object)
    assert listed["doc"]["given"]
    for id in (first["id"], both["id"]):
        assert client.delete(f"/memories/{id}", cast_to=object)["deleted"]
        with pytest.raises(openai.NotFoundError, match="there is no memory"):
            said(client, extra_body={"memory": id})
    with pytest.raises(openai.PermissionDeniedError, match="stays"):
        client.delete("/memories/doc", cast_to=object)


def test_serving_page_runs(server, capsys):
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    text = "\n".join(re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S))
    assert text.count("http://127.0.0.1:8000") == 1
    exec(text.replace("http://127.0.0.1:8000", server.url).replace('"first"', '"tiny"'), {})
    assert "tokens were read before" in capsys.readouterr().out and server.health()["memories"] == 1


COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("path", "fields", "status", "message", "param"),
    [
        (COMPLETIONS, dict(model="other"), 404, "there is no model 'other'", "model"),
        (COMPLETIONS, dict(model=None), 400, "model: ", "model"),
        (COMPLETIONS, dict(prompt=""), None, "", None),  # begin-of-text is a token
        (COMPLETIONS, dict(prompt="", memory="doc"), 400, "no tokens", "prompt"),
        (COMPLETIONS, dict(prompt=[]), 400, "prompt: ", "prompt"),
        (COMPLETIONS, dict(prompt=[[]]), 400, "no tokens", "prompt"),
        (COMPLETIONS, dict(prompt=[320]), 400, "tokens are from 0 to 319", "prompt"),
        (COMPLETIONS, dict(prompt=[-1]), 400, "tokens are from 0 to 319", "prompt"),
        (COMPLETIONS, dict(prompt=[10**30]), 400, "tokens are from 0 to 319", "prompt"),
        (COMPLETIONS, dict(prompt=[True]), 400, "prompt: ", "prompt"),
        (COMPLETIONS, dict(prompt={"a": 1}), 400, "prompt: ", "prompt"),
        (COMPLETIONS, dict(prompt=["a", 1]), 400, "prompt: ", "prompt"),
        (COMPLETIONS, dict(prompt="\ud800"), 400, "prompt: ", "prompt"),
        (COMPLETIONS, dict(max_tokens=0), 400, "max_tokens: ", "max_tokens"),
        (COMPLETIONS, dict(max_tokens="9"), 400, "max_tokens: ", "max_tokens"),
        (COMPLETIONS, dict(max_tokens=True), 400, "max_tokens: ", "max_tokens"),
        (COMPLETIONS, dict(max_tokens=5000), 400, "at most 4096", "max_tokens"),
        (COMPLETIONS, dict(temperature=-0.1), 400, "temperature: ", "temperature"),
        (COMPLETIONS, dict(temperature=float("nan")), 400, "temperature: ", "temperature"),
        (COMPLETIONS, dict(temperature=float("inf")), 400, "temperature: ", "temperature"),
        (COMPLETIONS, dict(top_p=0), 400, "top_p: ", "top_p"),
        (COMPLETIONS, dict(seed=2**63), 400, "seed: ", "seed"),
        (COMPLETIONS, dict(stop=""), 400, "stop: ", "stop"),
        (COMPLETIONS, dict(stop=["x"] * 17), 400, "stop: ", "stop"),
        (COMPLETIONS, dict(stop=["x" * 1001]), 400, "stop: ", "stop"),
        (COMPLETIONS, dict(n=0), 400, "n: ", "n"),
        (COMPLETIONS, dict(n=17), 400, "16 at once", "n"),
        (COMPLETIONS, dict(n=16, prompt=["a"] * 128), 400, "256 waiting", "n"),
        (COMPLETIONS, dict(logprobs=True), 400, "logprobs: ", "logprobs"),
        (COMPLETIONS, dict(max_token=5), 400, "did you mean 'max_tokens'?", "max_token"),
        (COMPLETIONS, dict(echo=True), 400, "echo: ", "echo"),
        (COMPLETIONS, dict(presence_penalty=0.5), 400, "presence_penalty: ", "presence_penalty"),
        (COMPLETIONS, dict(logit_bias={"5": 1}), 400, "logit_bias: ", "logit_bias"),
        (COMPLETIONS, dict(memory="none"), 404, "there is no memory 'none'", "memory"),
        (COMPLETIONS, dict(memory="../../etc/passwd"), 404, "there is no memory", "memory"),
        (CHAT, dict(messages=[]), 400, "messages: ", "messages"),
        (CHAT, dict(messages="hi"), 400, "messages: ", "messages"),
        (CHAT, dict(messages=[{"role": "king", "content": "hi"}]), 400, "messages.0.role: ", "messages"),
        (CHAT, dict(messages=[{"role": "user"}]), 400, "messages.0.content: ", "messages"),
        (CHAT, dict(messages=[USER[0] | {"x": 1}]), 400, "messages.0", "messages"),
        (CHAT, dict(messages=[{"role": "developer", "content": "x"}]), 400, "no developers", "messages"),
        (CHAT, dict(tools=[{"type": "function"}]), 400, "tools: ", "tools"),
        (CHAT, dict(response_format={"type": "json_object"}), 400, "response_format", "response_format"),
        (CHAT, dict(top_logprobs=2), 400, "needs logprobs", "top_logprobs"),
        (CHAT, dict(tools=[], response_format={"type": "text"}, user="me", max_tokens=2), None, "", None),
        ("/v1/memories", dict(text=""), 400, "text: ", "text"),
        ("/v1/memories", dict(text="x", file="/etc/passwd"), 400, "unrecognized request argument: file", "file"),
        ("/v1/memories", dict(text="x", model="other"), 404, "there is no model", "model"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_request_is_refused_in_one_sentence(server, path, fields, status, message, param):
    whole = {COMPLETIONS: dict(model="tiny", prompt="x", max_tokens=1), CHAT: dict(model="tiny", messages=USER)}
    found, body = posted(server, path, **whole.get(path, {}) | fields)
    assert found == (status or 200), body
    if status is not None:
        error = body["error"]
        assert message in error["message"] and error["param"] == param and "\n" not in error["message"]
        assert error["type"] in ("invalid_request_error", "not_found_error") and body.keys() == {"error"}


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "message"),
    [
        ("GET", "/v1/nothing", None, {}, 404, "no such path"),
        ("GET", "/openapi.json", None, {}, 404, "no such path"),
        ("PUT", "/v1/models", None, {}, 405, "does not take"),
        ("GET", "/v1/memories/..%2f..%2fetc", None, {}, 404, "there is no"),
        ("POST", COMPLETIONS, "{", {}, 400, "no JSON"),
        ("POST", COMPLETIONS, "[" * 100_000, {}, 400, ""),
        ("POST", COMPLETIONS, '{"seed": ' + "9" * 5000 + "}", {}, 400, ""),
        ("POST", COMPLETIONS, b"\xff\xfe", {}, 400, ""),
        ("POST", COMPLETIONS, None, {}, 400, "JSON object"),
        ("POST", COMPLETIONS, "5", {}, 400, "JSON object"),
        ("POST", COMPLETIONS, '{"model": "tiny", "prompt": "x"}', {"content-type": "text/plain"}, 400, "sent as"),
        ("POST", COMPLETIONS, "x" * (9 << 20), {}, 413, "larger than 8,388,608 bytes"),
        ("GET", "/v1/models", None, {"host": "evil.example:8000"}, 403, "another name"),
    ],
)
def test_http_that_is_no_request_is_refused(server, method, path, body, headers, status, message):
    found, _, said = raw(server, method, path, body, headers)
    assert found == status, said
    error = json.loads(said)["error"]
    assert message in error["message"] and error["type"]


def test_client_that_goes_away_keeps_no_memory(server, client):
    with pytest.raises(openai.APITimeoutError):
        server.client(timeout=1.0).post("/memories", body={"text": "import os\n" * 10000}, cast_to=object)
    assert server.idle(5) and len(client.get("/memories", cast_to=object)["data"]) == 1


def test_server_has_no_errors_of_its_own_after_all_this(server):
    assert server.log.read_text() == "" and server.health() == {"status": "ok", "answers": 0, "memories": 1}
