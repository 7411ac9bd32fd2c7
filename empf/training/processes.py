"""Training by several processes: how they are started, what they add up, and how they end.

On CPUs `accelerate launch --cpu --num_processes N` starts a single process and leaves the others to mpirun; without it
training would go on alone, silently, with another batch size than was meant. The environment that it passes on does
not name N.

Launchers end without a word to their processes when they are killed, hang up or are told to stop. So each process
watches for the end of its launcher, and saves and ends then.
"""

import argparse
import ctypes
import os
import signal
import sys
import threading
import time
import warnings

import psutil  # comes with accelerate
import torch
import torch.distributed as dist
import yaml  # comes with accelerate, whose configuration files are YAML
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, GradientAccumulationPlugin
from torch import Tensor, nn

from empf.machine import check_workers, use_cpu
from empf.training.capture import check_capture
from empf.training.config import TrainConfig

ALREADY_STARTED = ("RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
LAUNCHERS = {
    "accelerate", "accelerate-launch", "accelerate.commands.launch", "torchrun", "torch.distributed.run",
    "torch.distributed.launch",
}  # fmt: skip
WATCH_SECONDS = 0.5  # between two looks at the launcher
COMPRESSION = {  # of the gradients: name and options in Accelerate; PowerSGD leaves its first updates as they are
    "none": (DDPCommunicationHookType.NO, {}),
    "bf16": (DDPCommunicationHookType.BF16, {}),
    "powersgd": (DDPCommunicationHookType.POWER_SGD, {"matrix_approximation_rank": 4, "start_powerSGD_iter": 1000}),
}


def start_processes(argv: list[str]) -> None:
    """Replace this process by torchrun with the N processes, if N > 1 were asked for and not started.

    `argv` is the script with its flags. Raises ValueError with one sentence if N cannot be found out.
    """
    command = launcher()
    if LAUNCHERS & {os.path.basename(part) for part in command[:6]}:
        end_with_launcher()
    on_cpus = os.environ.get("ACCELERATE_USE_CPU", "True") == "True" or not torch.cuda.is_available()
    asked = "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ and on_cpus
    if not asked or any(name in os.environ for name in ALREADY_STARTED):
        return
    processes = asked_for(command)
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
    try:
        return psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return []


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


def end_with_launcher() -> None:
    """Let this process get a SIGTERM when the one that started it has ended."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG; stays when torchrun takes this process over

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Device, processes and tracker; raises ValueError where what is asked for is not installed or not possible."""
    installed = [tracker.value for tracker in get_available_trackers()]
    trackers = config.tracker.split(",") if config.tracker else []
    if missing := [tracker for tracker in trackers if tracker not in installed]:
        raise ValueError(
            f"tracker {missing[0]!r} is unknown to Accelerate or not installed: install it or leave --tracker out; "
            f"installed: {', '.join(installed) or 'none'}"
        )
    check_workers(config.workers)
    hook, options = COMPRESSION[config.grad_compression]
    parallel = DistributedDataParallelKwargs(
        broadcast_buffers=False, gradient_as_bucket_view=True, comm_hook=hook, comm_state_option=options
    )
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    for of_torch in ("`broadcast_buffers` is deprecated", "Grad strides do not match"):  # strides of sizes of 1 differ
        warnings.filterwarnings("ignore", of_torch)
    accelerator = Accelerator(
        cpu=several and not torch.cuda.is_available(),  # else they would not see each other
        mixed_precision=config.mixed_precision,
        log_with=trackers or None,
        project_dir=".",  # the run folder takes its place once it is known
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # else it divides the loss once more
        kwargs_handlers=[parallel],
    )
    if accelerator.device.type == "cpu":  # accelerate launch sets OMP_NUM_THREADS=1
        use_cpu(config.threads, accelerator.num_processes)
        if config.grad_compression == "bf16" and accelerator.num_processes > 1:
            raise ValueError("processes on CPUs cannot exchange gradients in bf16: use --grad-compression powersgd")
    if config.cuda_graphs:
        drawn = config.steps_per_batch if config.learning == "random" else config.T
        check_capture(accelerator.device, accelerator.num_processes, config.T, drawn)
    return accelerator


def settle() -> None:
    """Wait until the threads of gloo have let go of what was exchanged last; call it before Python ends.

    A thread that lets go of a tensor while Python ends aborts the process, and its launcher reports a failure.
    """
    if dist.is_initialized() and dist.get_backend() == "gloo":
        time.sleep(0.2)


def total(values: Tensor) -> Tensor:
    """The sum of the values of all processes, in place; they lie on the device of the training."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


@torch.no_grad()
def average_norms(model: nn.Module) -> None:
    """Give every process the mean of the running statistics, so that all evaluate one and the same network."""
    if dist.is_initialized():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                total(buffer).div_(dist.get_world_size())


def what_to_do(error: RuntimeError) -> str | None:
    """A sentence about an error that is not the code's: another process has gone, memory is full. Else None."""
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        return "another process has died; what was saved is intact, continue with --resume"
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
        return "there is not enough memory: use a smaller --batch-size or --width"
    return None
