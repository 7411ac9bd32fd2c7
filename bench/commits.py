"""Packed networks of two commits on a CPU, which take turns: how much faster one is than the other.

    python bench/commits.py cb14b2b HEAD

Each commit is checked out in a folder of its own and answers in a process of its own, with the same ResNet-18. Writes
bench/results/commits.json: milliseconds per call, and the time of the second over that of the first, from turns that
follow each other.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for bench.*, where this file is run as a script

from bench.machine import machine, spread
from empf.files import write_result

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "bench" / "results" / "commits.json"
CELL = ("bits", "width", "threads", "batch")
ANSWER = """
import json, statistics, sys, time
import kernels, torch
sys.modules["empf.kernels"] = kernels  # an old checkout has it only where it is installed
import empf
torch.set_grad_enabled(False)
nets = {}
for line in sys.stdin:
    bits, width, threads, batch, calls = json.loads(line)
    torch.set_num_threads(threads)
    if (bits, width) not in nets:
        torch.manual_seed(0)
        model = empf.build(empf.ModelConfig(num_classes=100, width=width, spike_bits=bits))
        nets[bits, width] = empf.pack(model.eval())
    net, x, times = nets[bits, width], torch.ones(batch, 3, 32, 32), []
    for _ in range(calls + 1):  # the first one finds nothing in the cache
        empf.reset(net)
        begin = time.perf_counter()
        net(x)
        times.append(1e3 * (time.perf_counter() - begin))
    print(json.dumps(statistics.median(times[1:])), flush=True)
"""


class Commit:
    """A process in a folder with the files of a commit."""

    def __init__(self, name: str, folder: Path):
        self.hash = git("rev-parse", f"{name}^{{commit}}")
        git("worktree", "add", "--quiet", "--detach", str(folder), self.hash)
        self.process = subprocess.Popen(
            [sys.executable, "-c", ANSWER], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ms(self, *cell) -> float:
        """Of a call, the median of some."""
        print(json.dumps(cell), file=self.process.stdin, flush=True)
        if not (answer := self.process.stdout.readline()):
            raise SystemExit(f"error: {self.hash[:7]} gave no answer, see above")
        return json.loads(answer)


def git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def measure(commits: list[Commit], cells: list[tuple], rounds: int) -> list[dict]:
    rows = []
    for cell in cells:
        turns = max(3, rounds // (1 + cell[-1] // 8))
        for commit in commits:
            commit.ms(*cell, 2)
        pairs = [tuple(commit.ms(*cell, 3) for commit in commits) for _ in range(turns)]
        old, new = map(spread, zip(*pairs, strict=True))
        over = spread(b / a for a, b in pairs)
        rows.append({**dict(zip(CELL, cell, strict=True)), "ms": [old, new], "second_over_first": over, "turns": turns})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description="Packed networks of two commits.", allow_abbrev=False)
    p.add_argument("commits", nargs=2, metavar="COMMIT")
    p.add_argument("--bits", type=int, nargs="+", default=[0, 4], help="of the spikes; 0: floating point")
    p.add_argument("--widths", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    p.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    p.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    p.add_argument("--rounds", type=int, default=20, help="turns of each at batch 1 (default: 20)")
    p.add_argument("--json", type=Path, default=OUT, help="default: bench/results/commits.json")
    args = p.parse_args(argv)
    cells = [(b or None, *rest) for b, *rest in product(args.bits, args.widths, args.threads, args.batches)]
    with tempfile.TemporaryDirectory() as folder:
        commits = []
        try:
            for i, name in enumerate(args.commits):
                commits.append(Commit(name, Path(folder) / str(i)))
            rows = measure(commits, cells, args.rounds)
        finally:
            for commit in commits:
                commit.process.kill()
            for i in range(len(args.commits)):
                subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(Path(folder) / str(i))])
    result = {"machine": machine(), "commits": [commit.hash for commit in commits], "rows": rows}
    write_result(args.json, json.dumps(result, indent=1) + "\n")
    print(f"written to {args.json}")


if __name__ == "__main__":
    main()
