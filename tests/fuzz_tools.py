"""What the fuzzers of packed files, run folders and recordings share: nasty values, damaged bytes, the loop."""

import copy
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

NASTY = [
    None, True, 0, -1, 1, 2, 3, 7, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x",
    "binary", "\x1b]0;x\x07", "a\nb", "ä" * 5000, [], ["x"], {}, {"a": []}, "resnet19", "vgg_snn", "ternary", "mem_bn",
    "lif", 4, 8,
]  # fmt: skip
MEMORY = 3 << 30  # bytes that all cases together may allocate beyond what there is
Case = Callable[[random.Random, Path], str]  # makes a file in a folder; says what became of it, or raises


def some_bytes(data: bytes, r: random.Random, header: int = 0) -> bytes:
    """Bits turned, a cut, junk over or between or behind, junk alone, a header that is nested without end."""
    at = r.randrange(max(1, r.choice((8, header, len(data)))))
    at, junk = min(at, len(data) - 1), r.randbytes(r.randrange(1, 200))
    return r.choice(
        [
            lambda: data[:at] + bytes([data[at] ^ 1 << r.randrange(8)]) + data[at + 1 :],
            lambda: data[:at],
            lambda: data[:at] + junk + data[at + len(junk) :],
            lambda: data[:at] + junk + data[at:],
            lambda: data[:at] + data[at + len(junk) :],
            lambda: data + junk,
            lambda: junk,
            lambda: data[:8] + b"[" * (header - 8) + data[header:],
        ]
    )()


def some_value(values, r: random.Random, special: tuple = ()):
    """Another value, a missing or a new key somewhere in nested dicts, or something else in their place."""
    nasty = [*NASTY, *special]
    if r.random() < 0.05:
        return copy.deepcopy(r.choice(nasty))
    part = values
    while True:
        inner = [value for value in part.values() if isinstance(value, dict) and value]
        if not inner or r.random() < 0.2:
            break
        part = r.choice(inner)
    name = r.choice([*part, "unknown"])
    how = r.random()
    if how < 0.1:
        part.pop(name, None)
    elif how < 0.2:
        nested: list = []
        for _ in range(300):
            nested = [nested]
        part[name] = nested
    elif how < 0.3 and isinstance(part.get(name), list) and part[name]:
        part[name] = [*part[name], copy.deepcopy(r.choice(nasty))][r.randrange(2) :]
    else:
        part[name] = copy.deepcopy(r.choice(nasty))
    return values


def refusal(error: Exception, *places: Path) -> str:
    """`refused`, if it is one short sentence that names one of the places."""
    words = str(error)
    assert any(str(place) in words for place in places), words
    assert words.isprintable() and len(words) < len(str(places[0])) + 500, words
    return "refused"


def fuzz(case: Case, count: int, seed: int, folder: Path) -> tuple[Counter, list[str], float]:
    """(outcomes, what went wrong, seconds of the slowest case); a case that asks for `MEMORY` gets a MemoryError."""
    r, outcomes, wrong, slowest = random.Random(seed), Counter(), [], 0.0
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MEMORY, limits[1]))
    try:
        for number in range(count):
            start = time.perf_counter()
            try:
                outcomes[case(r, folder)] += 1
            except Exception as error:  # whatever it is, it is a finding
                wrong.append(f"seed {seed}, case {number}: {type(error).__name__}: {str(error)[:300]}")
            slowest = max(slowest, time.perf_counter() - start)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    return outcomes, wrong, slowest


def by_hand(case: Case) -> None:
    """`python tests/fuzz_NAME.py COUNT [SEED]`."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        found, failures, longest = fuzz(
            case, int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, Path(temporary)
        )  # fmt: skip
    print(dict(found), f"wrong: {len(failures)}, slowest {longest:.2f} s", *failures[:20], sep="\n")
    sys.exit(bool(failures))
