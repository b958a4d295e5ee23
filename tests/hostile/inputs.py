"""Hostile inputs: for every kind a way to draw them, and what has to come of them.

A target takes an empty folder and hypothesis's `draw`, builds one input and hands it to the entry point that a user
would. What comes back is right, or it is refused in one sentence; anything else fails the target.
"""

import contextlib
import copy
import functools
import io
import json
import re
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import hypothesis
from hypothesis import strategies as st

from mosaics.cli import main, sentence

SLOWEST = 20.0  # seconds for one input; what takes longer counts as a hang
_LONGEST = 1500  # characters of an error
# What Python says to programmers. A user who reads it learns nothing.
_INTERNAL = re.compile(
    r"codec can't|has no attribute|not subscriptable|positional argument|unexpected keyword|not enough values|"
    r"too many values|invalid literal|unsupported operand|object is not|not iterable|unhashable|NoneType|"
    r"index out of|recursion depth|Traceback|Expecting value",
)

TARGETS: dict[str, Callable] = {}


class NotRefusedInOneSentence(AssertionError):
    """An input that came to neither a result nor one sentence."""


def target(function: Callable) -> Callable:
    TARGETS[function.__name__] = function
    return function


def attempts(name: str, examples: int, seed: int | None = None) -> int:
    """Tries a target with drawn inputs; hypothesis shrinks and shows one that fails.

    Args:
        name: of the target.
        examples: inputs to try.
        seed: of the draws; None draws the same inputs always.

    Returns:
        Inputs tried.
    """
    tried = 0

    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=seed is None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=set(hypothesis.Phase) - {hypothesis.Phase.explain},
        print_blob=False,
    )
    @hypothesis.given(st.data())
    def attempt(data):
        nonlocal tried
        tried += 1
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            with _in_time(name):
                TARGETS[name](Path(folder), data.draw)

    (attempt if seed is None else hypothesis.seed(seed)(attempt))()
    return tried


@contextlib.contextmanager
def _in_time(name: str):
    def late(*args):
        raise NotRefusedInOneSentence(f"{name}: one input took more than {SLOWEST:.0f} s")

    # Time of the processor, so that a busy machine fails nothing; and of the clock, for what waits for ever.
    timers = (signal.SIGPROF, signal.ITIMER_PROF, SLOWEST), (signal.SIGALRM, signal.ITIMER_REAL, 10 * SLOWEST)
    # The first may be swallowed (in a callback of the collector), so it comes again.
    before = [(signal.signal(number, late), signal.setitimer(timer, seconds, 1)) for number, timer, seconds in timers]
    try:
        yield
    finally:
        for (number, timer, _), (handler, left) in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)
            signal.setitimer(timer, *left)  # that of pytest-timeout


def result_or_sentence(call: Callable, *names: object):
    """What `call` gives, or None if it is refused properly; an error has to name one of `names` (if there are any)."""
    try:
        return call()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        text = sentence(error) if isinstance(error, Exception) else repr(error)
        raw = isinstance(error, UnicodeError | json.JSONDecodeError) or type(error).__module__.startswith("pydantic")
        proper = isinstance(error, ValueError | OSError) and not raw and 0 < len(text) <= _LONGEST
        if not proper or _is_internal(text) or (names and not any(str(name) in text for name in names)):
            raise NotRefusedInOneSentence(f"{type(error).__name__}: {text[:2000]}") from error
        return None


def _is_internal(text: str) -> bool:
    return bool(_INTERNAL.search(re.sub(r"\([^()]*(\([^()]*\)[^()]*)*\)", "", text)))  # a reason in brackets may be


def command(*words: object) -> str | None:
    """Runs the command line: what it printed, or None if it was refused in one sentence with exit code 2."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = main([str(word) for word in words])
    said = errors.getvalue()
    lines = said.splitlines()
    if code == 0:
        return output.getvalue()
    refused = (
        code == 2 and lines and lines[-1].startswith("error: ") and sum(x.startswith("error: ") for x in lines) == 1
    )
    if not refused or len(lines[-1]) > _LONGEST or _is_internal(lines[-1]) or "Traceback" in said:
        raise NotRefusedInOneSentence(f"exit code {code}: {said[-2000:]}")
    return None


# Drawing

_DEEP = functools.reduce(lambda inner, _: [inner], range(200), [])
ODD = [
    None, True, False, -1, 0, 1, 2, 7, 255, 2**31, 2**63, 2**64, 10**30, -(10**30), 10**4400, 0.5, 1e-320, 1e308, -0.0,
    float("nan"), float("inf"), float("-inf"), "", " ", "x", "nan", "1", "a" * 5000, "../../etc/passwd", "/etc/passwd",
    "\0", "\ud800", "\u202e\u05d0\U0001f9e9", "~", "null", [], {}, [[]], [1, 2], [-1, 0], {"a": 1}, {"": None}, _DEEP,
]  # fmt: skip
ODD_VALUES = st.sampled_from(ODD) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def mutated(draw, data: bytes) -> bytes:
    """The bytes with a few of them changed, cut, repeated or put in."""
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        end = min(len(data), place + draw(st.sampled_from([1, 2, 8, 64, 1 << 20])))
        how = draw(st.sampled_from(["flip", "cut", "remove", "repeat", "insert", "replace", "empty"]))
        if how == "flip" and data:
            data = data[:place] + bytes([data[place] ^ 1 << draw(st.integers(0, 7))]) + data[place + 1 :]
        elif how == "cut":
            data = data[:place]
        elif how == "remove":
            data = data[:place] + data[end:]
        elif how == "repeat":
            data = data[:end] + data[place:end] + data[end:]
        elif how == "insert":
            data = data[:place] + draw(st.binary(max_size=40)) + data[place:]
        elif how == "replace":
            data = draw(st.binary(max_size=80))
        elif how == "empty":
            data = b""
    return data


def mutated_tree(draw, value):
    """Plain data with a value replaced, removed, renamed or added somewhere in it."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 2))):
        places = list(_places(value))
        if not places:
            return copy.deepcopy(draw(ODD_VALUES))
        container, key = draw(st.sampled_from(places))
        how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "rename"]))
        if how == "remove":
            del container[key]
        elif how == "add" and isinstance(container, dict):
            container[draw(st.text(max_size=8) | st.sampled_from(NAMES))] = copy.deepcopy(draw(ODD_VALUES))
        elif how == "rename" and isinstance(container, dict):
            container[draw(st.text(max_size=8) | st.sampled_from(NAMES))] = container.pop(key)
        else:
            container[key] = copy.deepcopy(draw(ODD_VALUES))
    return value


NAMES = ["name", "cls", "self", "values", "auto_map", "__class__", "quantization_config", "dtype", "kwargs", "1"]


def _places(value):
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def json_text(value) -> bytes:
    """JSON as Python writes it: with NaN, and with half surrogates escaped."""
    try:
        return json.dumps(value).encode()
    except ValueError:  # more digits than Python prints
        return json.dumps(str(type(value))).encode()
