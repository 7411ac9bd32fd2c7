"""Train by two processes while random signals hit the launcher and the workers, and see that nothing is lost.

python bench/soak.py                 30 rounds, about a minute each; result in bench/results/soak.json
python bench/soak.py --rounds 5 --json -

Each round starts or continues one run with `accelerate launch --cpu --num_processes 2`, waits until it has saved, sends
SIGTERM, SIGINT, SIGHUP or SIGKILL to the launcher, to one worker or to all of them, and waits until every process of
it has ended. The last round is left alone. The run has to equal one that nothing happened to, weights and metrics
apart from the clock, and no process may be left. Exits 1 where that is not so.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))  # for bench.*, where this file is run as a script
from empf.files import write_result
from empf.machine import machine
from empf.runs import load_state, read_metrics
from empf.training.config import Parser

ROOT = Path(__file__).parents[1]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", str(ROOT / "train.py")]
TINY = ["--width", "0.0625", "--T", "2", "--limit", "800", "--batch-size", "16", "--threads", "1"]
TINY += ["--save-minutes", "0"]  # after each look at the loss, twice in an epoch of 25 batches
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL)
PATIENCE = 120  # seconds until every process of a round has ended


def start(arguments: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.Popen([*LAUNCH, *arguments], env=environment, start_new_session=True, **quiet)


def family(launcher: int) -> list[psutil.Process]:
    """The launcher and all that it has started."""
    try:
        process = psutil.Process(launcher)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def hit(processes: list[psutil.Process], rng: random.Random) -> str:
    """Send one signal to one of the processes, or to all of them; what was done."""
    number, whom = rng.choice(SIGNALS), rng.choice(("launcher", "worker", "all"))
    targets = {"launcher": processes[:1], "worker": processes[-1:], "all": processes}[whom]
    for process in targets:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
    return f"{number.name} to {whom}"


def round_of(run: Path, arguments: list[str], rng: random.Random) -> str:
    """One start that is hit after it has saved; raises ValueError where a process does not end."""
    state = run / "state" / "state.pt"
    before = state.stat().st_mtime_ns if state.exists() else 0
    launcher = start(arguments)
    while launcher.poll() is None and not (
        (run / "config.json").exists() and state.exists() and state.stat().st_mtime_ns > before
    ):
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 1))
    processes = family(launcher.pid)
    done = hit(processes, rng) if processes else "it had ended by itself"
    launcher.wait(PATIENCE)
    left = psutil.wait_procs(processes, timeout=PATIENCE)[1]
    for process in left:
        process.kill()
    if left:
        raise ValueError(f"{len(left)} processes were left {PATIENCE} s after {done}")
    return done


def trace(run: Path) -> tuple:
    clock = ("images_per_s", "seconds")
    records = [{k: v for k, v in record.items() if k not in clock} for record in read_metrics(run)]
    return (run / "model.safetensors").read_bytes(), json.dumps(records), load_state(run)["at"]["epoch"]


def main(argv: list[str] | None = None) -> None:
    p = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--rounds", type=int, default=30, help="signals (default: 30)")
    p.add_argument("--epochs", type=int, default=30, help="of 25 batches each (default: 30)")
    p.add_argument("--seed", type=int, default=0, help="of the signals and their moments")
    p.add_argument("--json", type=Path, default=ROOT / "bench" / "results" / "soak.json", help="where the result goes")
    args = p.parse_args(argv)
    rng, rounds = random.Random(args.seed), []
    for number in SIGNALS[:3]:  # ignored under nohup and in the background of a shell, which would be inherited
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    new = [*TINY, "--epochs", str(args.epochs), "--sync-bn", "--output-dir"]
    with tempfile.TemporaryDirectory() as folder:
        whole, run = Path(folder, "whole"), Path(folder, "run")
        try:
            for number in range(args.rounds):
                again = (run / "config.json").exists()
                arguments = ["--resume", str(run), "--save-minutes", "0"] if again else [*new, str(run)]
                done = round_of(run, arguments, rng)
                at = load_state(run)["at"] if (run / "state" / "state.pt").exists() else {"epoch": 0, "batch": 0}
                rounds.append(f"{done}; saved at epoch {at['epoch']}, batch {at['batch']}")
                print(f"round {number + 1}: {rounds[-1]}", file=sys.stderr, flush=True)
            for arguments in (["--resume", str(run)], [*new, str(whole)]):
                if start(arguments).wait() != 0:
                    raise ValueError(f"train.py {' '.join(arguments)} failed")
            if trace(run) != trace(whole):
                raise ValueError("the run is not equal to the one that nothing happened to")
        except (ValueError, OSError, subprocess.TimeoutExpired) as error:
            sys.exit(f"error: {error}")
    result = {
        "command": f"python bench/soak.py --rounds {args.rounds} --epochs {args.epochs} --seed {args.seed}",
        "machine": machine(), "equal_to_the_uninterrupted_run": True, "processes_left": 0, "rounds": rounds,
    }  # fmt: skip
    write_result(args.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
