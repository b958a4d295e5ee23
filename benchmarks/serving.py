"""Tokens a second of `mosaics serve`, for ever more clients at once.

python benchmarks/serving.py MODEL [--clients 1,2,4,8,16] [--tokens 64] [--memory FILE]

Every client asks one question after the other, each of as many tokens as the others, and streams the answers. Reported
are the tokens that all got together in a second, the median time to a first token, and between tokens.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import openai

PROMPTS = ["import ", "def read(path):\n", "class Window:", "for i in range(", "return ", '"""', "x = [", "while True:"]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("model")
    options.add_argument("--clients", default="1,2,4,8,16")
    options.add_argument("--tokens", type=int, default=64)
    options.add_argument("--questions", type=int, default=3)
    options.add_argument("--memory", help="a kept memory that every question comes after")
    asked = options.parse_args()
    command = [sys.executable, "-m", "mosaics", "serve", asked.model, "--port", "0", "--name", "measured"]
    command += ["--memory", f"kept={asked.memory}"] if asked.memory else []
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://\S+", server.stdout.readline())[0].rstrip(";")
        measure(url, asked, 1)  # does not count
        print("| clients | tokens a second | first token, ms | between tokens, ms |\n|---|---|---|---|")
        for clients in map(int, asked.clients.split(",")):
            speed, first, between = measure(url, asked, clients)
            print(f"| {clients} | {speed:.0f} | {1000 * first:.0f} | {1000 * between:.1f} |", flush=True)
    finally:
        server.terminate()
        server.wait()


def measure(url: str, asked: argparse.Namespace, clients: int) -> tuple[float, float, float]:
    def ask(number: int) -> tuple[int, list[float], list[float]]:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        written, first, between = 0, [], []
        for question in range(asked.questions):
            begin = time.perf_counter()
            stream = client.completions.create(
                model="measured",
                prompt=PROMPTS[(number + question) % len(PROMPTS)],
                max_tokens=asked.tokens,
                temperature=0.8,
                seed=number,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"memory": "kept"} if asked.memory else None,
            )
            came = None
            for chunk in stream:
                came = came or time.perf_counter()
                if chunk.usage:
                    written += chunk.usage.completion_tokens
                    tokens = max(chunk.usage.completion_tokens - 1, 1)
            first.append(came - begin)
            between.append((time.perf_counter() - came) / tokens)
        return written, first, between

    begin = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        found = list(threads.map(ask, range(clients)))
    seconds = time.perf_counter() - begin
    return (
        sum(written for written, _, _ in found) / seconds,
        statistics.median(x for _, first, _ in found for x in first),
        statistics.median(x for _, _, between in found for x in between),
    )


if __name__ == "__main__":
    main()
