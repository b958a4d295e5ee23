"""What a server does at most, and how it ends: `make test-clients`."""

import signal
import socket
import threading
import time

import openai
import pytest

from serving.test_server import raw, said

pytestmark = pytest.mark.clients


@pytest.fixture(scope="module")
def narrow(start, endless):
    """A server with little room, whose answers only a limit ends."""
    words = "--parallel 2 --queue 1 --max-context 4000 --max-tokens 100000 --max-body 20000 --memories 2"
    return start(endless, *words.split(), "--memory-bytes", 80000, "--name", "other/name", MOSAICS_API_KEY="s3cret")


@pytest.fixture(scope="module")
def inside(narrow):
    """Asks it for answers that take their time; options as `said`."""
    client = narrow.client(api_key="s3cret")
    return lambda prompt="x", **more: said(more.pop("client", client), prompt, model="other/name", **more)


LONG = dict(max_tokens=3900, temperature=1)


def test_limits_are_kept_with_clear_answers(narrow, inside):
    client = narrow.client(api_key="s3cret")
    assert client.models.retrieve("other/name").id == "other/name"
    with pytest.raises(openai.BadRequestError, match="more than 4000") as caught:
        inside("import os\n" * 1000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="more than 4000"):
        inside(max_tokens=4000)
    with pytest.raises(openai.APIStatusError, match="larger than 20,000 bytes") as caught:
        inside("x" * 20001)
    assert caught.value.status_code == 413
    with pytest.raises(openai.BadRequestError, match="2 at once"):
        inside(n=3)


def test_memories_go_for_others_and_are_missed_with_a_clear_answer(narrow, inside):
    client = narrow.client(api_key="s3cret")
    memories = [client.post("/memories", body={"text": "import os\n" * n}, cast_to=object)["id"] for n in (1, 2, 3)]
    with pytest.raises(openai.NotFoundError, match="had to go") as caught:
        inside(extra_body={"memory": memories[0]})
    assert caught.value.code == "memory_not_found"
    inside(extra_body={"memory": memories[1]})
    fourth = client.post("/memories", body={"text": "import"}, cast_to=object)["id"]
    listed = [one["id"] for one in client.get("/memories", cast_to=object)["data"]]
    assert listed == [memories[1], fourth]  # the one that was used stayed
    with pytest.raises(openai.APIStatusError, match="does not fit") as caught:
        client.post("/memories", body={"text": "import os\n" * 100}, cast_to=object)
    assert caught.value.status_code == 413 and narrow.health()["memories"] == 2
    for id in (memories[1], fourth):
        client.delete(f"/memories/{id}", cast_to=object)


def test_too_many_answers_are_refused_for_now(narrow, inside):
    streams = [inside(stream=True, n=n, **LONG) for n in (2, 1)]
    with pytest.raises(openai.RateLimitError, match="ask again later") as caught:
        inside()
    assert caught.value.response.headers["retry-after"] == "1"
    for stream in streams:
        stream.close()
    assert narrow.idle(5)
    inside()


def test_client_that_goes_away_ends_its_answer(narrow, inside):
    stream = inside(stream=True, **LONG)
    next(iter(stream))
    assert narrow.health()["answers"] == 1
    stream.close()
    assert narrow.idle(3)
    hasty = narrow.client(api_key="s3cret", timeout=1.0)
    with pytest.raises(openai.APITimeoutError):
        inside(client=hasty, **LONG)
    assert narrow.idle(3)


def test_client_that_goes_away_before_its_turn_is_forgotten(narrow, inside):
    writing = inside(n=2, stream=True, **LONG)
    next(iter(writing))
    waiting = inside(stream=True, **LONG)
    assert narrow.health()["answers"] == 3
    waiting.close()
    end = time.monotonic() + 3
    while narrow.health()["answers"] > 2 and time.monotonic() < end:
        time.sleep(0.05)
    assert narrow.health()["answers"] == 2
    writing.close()
    assert narrow.idle(3)


def test_key_is_wanted_where_one_is_set(narrow):
    with pytest.raises(openai.AuthenticationError, match="key is missing or wrong"):
        narrow.client(api_key="other").models.list()
    assert raw(narrow, "GET", "/v1/models")[0] == 401
    assert narrow.health()["status"] == "ok"
    assert narrow.client(api_key="s3cret").models.list().data


def test_time_for_a_request_ends_and_an_idle_server_at_once(start, endless):
    slow = start(endless, "--timeout", 1.5, "--max-tokens", 10**6, "--max-context", 10**7)
    client, begin = slow.client(), time.monotonic()
    asked = dict(model="endless", temperature=1, max_tokens=10**6)
    with pytest.raises(openai.APIStatusError, match="time for a request is over") as caught:
        said(client, **asked)
    assert caught.value.status_code == 408 and time.monotonic() - begin < 20
    assert caught.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(openai.APIError, match="time for a request is over"):  # in the middle of a stream
        for _ in said(client, stream=True, **asked):
            pass
    assert slow.idle(5)
    half = socket.create_connection(("127.0.0.1", int(slow.url.rpartition(":")[2])))
    half.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{")
    said(client, model="endless", max_tokens=2)  # a body that never comes keeps nobody waiting
    half.close()
    begin = time.monotonic()
    assert slow.end(signal.SIGINT) == 0 and time.monotonic() - begin < 5
    assert slow.log.read_text() == ""


def test_server_ends_open_requests_and_tells_the_others(start, endless):
    ending = start(endless, "--grace", 2, "--max-tokens", 10**6, "--max-context", 10**7)
    client, waited = ending.client(), []
    asked = dict(model="endless", temperature=1, max_tokens=10**6)
    long, short = said(client, stream=True, **asked), said(client, stream=True, model="endless", max_tokens=20)
    next(iter(long))

    def wait():  # not streamed
        try:
            waited.append(said(client, **asked))
        except openai.APIError as error:
            waited.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    while ending.health()["answers"] < 3:
        time.sleep(0.01)
    begin = time.monotonic()
    ending.process.send_signal(signal.SIGTERM)
    *_, last = short
    assert last.choices[0].finish_reason == "length"
    with pytest.raises(openai.APIError, match="shutting down"):
        for _ in long:
            pass
    waiting.join(30)
    assert isinstance(waited[0], openai.InternalServerError) and "shutting down" in str(waited[0])
    assert ending.process.wait(30) == 0 and time.monotonic() - begin < 15
    assert ending.log.read_text() == ""


def test_narrow_server_has_no_errors_of_its_own_after_all_this(narrow):
    assert narrow.health() == {"status": "ok", "answers": 0, "memories": 0} and narrow.log.read_text() == ""
