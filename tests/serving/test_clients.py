"""Many clients, and rude ones: `make test-clients`."""

import http.client
import itertools
import json
import os
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest

from serving.conftest import DOCUMENT

pytestmark = pytest.mark.clients

PROMPTS = ["import ", "def f(x):\n", "class Heap", "x", "for i in range(", "return ", "'''", "while True:\n    "]


@pytest.fixture(scope="module")
def crowded(start, exported, kept):
    return start(exported, "--memory", f"doc={kept}", "--parallel", 8, "--memories", 4)


@pytest.fixture(scope="module")
def endlessly(start, endless):
    return start(endless, "--parallel", 8, "--max-tokens", 10**6, "--max-context", 10**7, "--max-body", 10000)


def held(server) -> tuple[int, int, int]:
    """Bytes, threads and open files of a server."""
    process = psutil.Process(server.process.pid)
    return process.memory_info().rss, process.num_threads(), process.num_fds()


def test_32_clients_side_by_side_get_what_each_gets_alone(crowded, loaded, greedy):
    tokenizer = loaded[1]
    document = tokenizer(DOCUMENT).input_ids
    expected = {}
    for prompt in PROMPTS:
        for memory in (None, "doc"):
            ids = tokenizer(prompt, add_special_tokens=memory is None).input_ids
            written = greedy((document if memory else []) + ids, 20)
            expected[prompt, memory] = tokenizer.decode(written, skip_special_tokens=True)
    barrier = threading.Barrier(32)

    def ask(number: int) -> None:
        client, draw = crowded.client(), random.Random(number)
        barrier.wait()
        for _ in range(6):
            prompt, memory, stream = draw.choice(PROMPTS), draw.choice([None, "doc"]), draw.random() < 0.5
            options = dict(model="tiny", prompt=prompt, temperature=0, max_tokens=20, stream=stream)
            answer = client.completions.create(**options, extra_body={"memory": memory})
            text = "".join(c.choices[0].text for c in answer) if stream else answer.choices[0].text
            assert text == expected[prompt, memory]

    with ThreadPoolExecutor(32) as threads:
        list(threads.map(ask, range(32)))
    assert crowded.health() == {"status": "ok", "answers": 0, "memories": 1} and crowded.log.read_text() == ""


def test_clients_that_go_away_leave_nothing_behind(endlessly):
    def leave(number: int) -> None:
        client, draw = endlessly.client(timeout=30), random.Random(number)
        for _ in range(4):
            with client.completions.create(
                model="endless", prompt=draw.choice(PROMPTS), max_tokens=10**6, stream=True, n=draw.choice([1, 2])
            ) as stream:
                for _ in zip(stream, range(draw.randrange(5)), strict=False):
                    pass

    sizes = []
    for round in range(4):
        with ThreadPoolExecutor(32) as threads:
            list(threads.map(leave, range(32 * round, 32 * round + 32)))
        assert endlessly.idle(10)
        sizes.append(held(endlessly))
    assert sizes[-1][0] - sizes[0][0] < 30e6 and sizes[-1][1] <= sizes[0][1] + 2 and sizes[-1][2] <= sizes[0][2] + 4
    answer = endlessly.client().completions.create(model="endless", prompt="x", max_tokens=5)
    assert answer.usage.completion_tokens == 5 and endlessly.log.read_text() == ""


def bad_requests() -> list[tuple[str, str, bytes, dict, set[int]]]:
    """Method, path, body, headers, and the statuses that may answer."""
    kind = {"content-type": "application/json"}
    bodies = [
        b"", b"{", b"[]", b"null", b"\xff", b"[" * 5000, b"9" * 5000, b'{"model": "endless"}', b"x" * 20000,
        *(
            json.dumps({"model": "endless", "prompt": "x"} | fields).encode()
            for fields in (
                {"max_tokens": -1}, {"prompt": 5}, {"prompt": "\ud800"}, {"n": 10**9}, {"model": "x" * 5000},
                {"memory": "../" * 100}, {"unknown" * 500: 1}, {"stop": [""]}, {"seed": 1e400}, {"prompt": [[-5]]},
                {"prompt": list(range(2000))}, {"temperature": "hot"}, {"stream": "yes"}, {"stream_options": 3},
            )
        ),
    ]  # fmt: skip
    posts = ("/v1/completions", "/v1/chat/completions", "/v1/memories")
    found = [("POST", path, body, kind, {400, 404, 413}) for path in posts for body in bodies]
    paths = ("/", "/v1", "/v1/memories/x", "/v1/models/..%2f..", "/" + "a" * 9000)
    found += [("GET", path, b"", {}, {404}) for path in paths]
    found += [("DELETE", "/v1/memories/x", b"", {}, {404}), ("PATCH", "/v1/completions", b"{}", kind, {405})]
    return [*found, ("GET", "/v1/models", b"", {"host": "evil.example"}, {403})]


def test_flood_of_bad_requests_is_refused_and_leaves_nothing_behind(endlessly):
    bad, address = bad_requests(), endlessly.url.removeprefix("http://")

    def flood(number: int) -> int:
        order = bad * 3
        random.Random(number).shuffle(order)
        connection = http.client.HTTPConnection(address, timeout=60)
        for method, path, body, headers, statuses in order:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            said = response.read()
            assert response.status in statuses, (method, path, body[:80], response.status, said[:200])
            assert "error" in json.loads(said)
        connection.close()
        return len(order)

    sizes = []
    for round in range(4):
        with ThreadPoolExecutor(16) as threads:
            sent = sum(threads.map(flood, range(16 * round, 16 * round + 16)))
        assert endlessly.idle(5)
        sizes.append(held(endlessly))
    print(f"{4 * sent} bad requests; bytes, threads and files held after each quarter: {sizes}")
    assert sizes[-1][0] - sizes[0][0] < 20e6 and sizes[-1][1] <= sizes[0][1] + 2 and sizes[-1][2] <= sizes[0][2] + 4
    answer = endlessly.client().completions.create(model="endless", prompt="x", max_tokens=5)
    assert answer.usage.completion_tokens == 5 and endlessly.log.read_text() == ""


def test_connections_that_make_no_request_keep_nobody_waiting(endlessly):
    port = int(endlessly.url.rpartition(":")[2])
    rude = [b"", b"\x00" * 100, b"GET"]
    rude += [b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99\r\n\r\n{"]
    rude += [b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 20000, b"\x16\x03\x01\x02\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
    before, sockets = held(endlessly), []
    for _, said in zip(range(140), itertools.cycle(rude), strict=False):
        sockets.append(socket.create_connection(("127.0.0.1", port), timeout=10))
        try:
            sockets[-1].sendall(said)
        except OSError:  # refused while we speak
            pass
    begin = time.monotonic()
    answer = endlessly.client().completions.create(model="endless", prompt="x", max_tokens=5)
    assert answer.usage.completion_tokens == 5 and time.monotonic() - begin < 20
    for one in sockets:
        one.close()
    end = time.monotonic() + 20
    while held(endlessly)[2] > before[2] + 4 and time.monotonic() < end:
        time.sleep(0.1)
    assert held(endlessly)[2] <= before[2] + 4 and endlessly.health()["status"] == "ok"


def test_memories_come_and_go_under_load(crowded, loaded):
    client, sizes, stop = crowded.client(), [], threading.Event()

    def ask() -> None:
        own = crowded.client()
        while not stop.is_set():
            for memory in own.get("/memories", cast_to=object)["data"]:
                try:
                    own.completions.create(
                        model="tiny", prompt="def ", max_tokens=3, temperature=0, extra_body={"memory": memory["id"]}
                    )
                except openai.NotFoundError as error:  # it had to go meanwhile
                    assert error.code == "memory_not_found"

    with ThreadPoolExecutor(4) as threads:
        asking = [threads.submit(ask) for _ in range(4)]
        for number in range(60):
            client.post("/memories", body={"text": DOCUMENT[number:]}, cast_to=object)
            if number % 20 == 19:
                sizes.append(held(crowded)[0])
        stop.set()
        for one in asking:
            one.result()
    assert crowded.health()["memories"] == 4 and crowded.idle(5)
    assert sizes[-1] - sizes[0] < 30e6, sizes
    client.completions.create(model="tiny", prompt="x", max_tokens=2, extra_body={"memory": "doc"})  # it stays


def test_shutdown_with_32_clients_hangs_nobody(start, endless):
    ending = start(endless, "--max-tokens", 10**6, "--max-context", 10**7, "--grace", 1)
    begun = threading.Semaphore(0)

    def ask(_: int) -> str:
        try:
            stream = ending.client().completions.create(model="endless", prompt="x", max_tokens=10**6, stream=True)
            begun.release()
            for _ in stream:
                pass
        except openai.APIError as error:
            return str(error)
        return "ended"

    with ThreadPoolExecutor(32) as threads:
        waiting = threads.map(ask, range(32))
        for _ in range(32):
            begun.acquire(timeout=60)
        begin = time.monotonic()
        assert ending.end() == 0 and time.monotonic() - begin < 15
        assert all("shutting down" in said for said in waiting)
    assert not os.path.exists(f"/proc/{ending.process.pid}")
