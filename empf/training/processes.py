"""Starts the processes that `accelerate launch --cpu --num_processes N` was asked for.

On CPUs that command starts a single process and leaves the others to mpirun; without it training would go on alone,
silently, with another batch size than was meant. The environment that it passes on does not name N.
"""

import argparse
import os
import sys

import torch.distributed as dist
import yaml  # comes with accelerate, whose configuration files are YAML

ALREADY_STARTED = ("RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def start_processes(argv: list[str]) -> None:
    """Replace this process by torchrun with the N processes, if N > 1 were asked for and not started.

    `argv` is the script with its flags. Raises ValueError with one sentence if N cannot be found out.
    """
    asked = os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ
    if not asked or any(name in os.environ for name in ALREADY_STARTED):
        return
    processes = asked_for(launcher())
    if processes is None:
        raise ValueError(
            "accelerate launch starts one process only on CPUs: name the number with --num_processes, or use "
            f"torchrun --nproc-per-node N {argv[0]}"
        )
    if processes == 1:
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    os.execv(sys.executable, [*torchrun, *argv])


def launcher() -> list[str]:
    """The command line of the process that started this one."""
    import psutil  # comes with accelerate

    return psutil.Process(os.getppid()).cmdline()


def asked_for(command: list[str]) -> int | None:
    """N of `accelerate launch --num_processes N ...`, or of the file in `--config_file FILE`."""
    p = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    p.add_argument("--num_processes", "--num-processes", type=int)
    p.add_argument("--config_file", "--config-file")
    found = p.parse_known_args(command)[0]
    if found.num_processes is None and found.config_file is not None:
        with open(found.config_file) as file:
            return yaml.safe_load(file).get("num_processes")
    return found.num_processes


def process_died(error: RuntimeError) -> bool:
    """Whether the error is what a process sees when another one has gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
