"""How every script starts, stops and writes: processes and devices, stop signals, errors that say what to do, locks,
files that are whole or absent."""

import difflib
import gc
import itertools
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import threading
import traceback
from datetime import timedelta
from functools import wraps
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

# ----- processes ----------------------------------------------------------------------------------
joined = itertools.count()  # how often processes were joined here


def start_processes(nccl=False):
    """(rank, number of processes, device) of this process. Those that torchrun started are joined: for tensors on the
    CPU by gloo, and if `nccl` for those on GPUs too; with it one process on a GPU is a group of one, for FSDP."""
    check_launch()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"LOCAL_RANK {device.index}: this machine has {torch.cuda.device_count()} GPUs; set "
                             f"--nproc_per_node to so many")
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        join_processes(rank, world, device if nccl and device.type == "cuda" else None)
    elif nccl and has_bf16(device) and dist.is_nccl_available() and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl", rank=0, world_size=1, store=dist.HashStore())
    return rank, world, device


def check_launch():
    """Raises ValueError where several processes were started, but not so that they find each other."""
    tasks, script = int(os.environ.get("SLURM_NTASKS", 1)), Path(sys.argv[0]).name
    if tasks > 1 and "RANK" not in os.environ:
        raise ValueError(f"Slurm has {tasks} tasks (SLURM_NTASKS), which would each do all the work; start one a "
                         f"node, srun --ntasks-per-node=1 torchrun --nnodes=$SLURM_NNODES --nproc_per_node=8 "
                         f"--rdzv_backend=c10d --rdzv_endpoint=HOST:29500 {script}, or unset SLURM_NTASKS")
    if "RANK" in os.environ and "LOCAL_RANK" not in os.environ:
        raise ValueError(f"RANK is set but LOCAL_RANK is not; start with torchrun --nproc_per_node=8 {script}, or "
                         f"unset RANK and WORLD_SIZE")


def join_processes(rank, world, gpu):
    """Joins torchrun's processes, by NCCL too where they have a GPU each."""
    # their store may still have the addresses of another main(), or, on one node, of torchrun's attempt before
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0) if one_node else 0
    store = dist.PrefixStore(f"{attempt}, {next(joined)}", next(dist.rendezvous("env://"))[0])
    patience = timedelta(hours=1 if gpu else 24)  # without NCCL one may have much more to do than the others
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", rank=rank, world_size=world,
                            store=store, device_id=gpu, timeout=patience)


def has_bf16(device):
    """Whether a device computes in bf16: GPUs of compute capability 8 (Ampere) on; others emulate it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


# ----- how a script ends --------------------------------------------------------------------------
opened = {}  # by what it is of, how each thing is closed that is open until its main() ends
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)}
REMEDIES = {  # a sign of what went wrong in a library: what the user can do
    "OutOfMemoryError": "the GPU's memory is full; set a smaller BATCH_SIZE, in train.py more MICRO_BATCHES",
    "DataLoader worker": "a loader's process was ended, for lack of memory or of room in /dev/shm; set fewer WORKERS, "
                         "or 0",
    "shared memory": "no room in /dev/shm for what loaders send; enlarge it, or set WORKERS = 0",
    "ompiler": "torch.compile found no working C++ compiler; install one, or set COMPILE = False",
}


def exit_status(number):
    """Of a program that a stop signal ended: as a shell reports Ctrl-C; 0 for those that schedulers send."""
    return 130 if number == signal.SIGINT else 0


def ends_in_one_line(main):
    """A script's main(). Ctrl-C, SIGTERM or SIGUSR1 end the whole program, also one that called main(), with one line;
    a second one at once. What libraries raise and the user can mend becomes an OSError with a remedy. An upper-case
    name set in the script since its import is a mistyped constant, and refused."""
    known = {name for name in main.__globals__ if name.isupper()}

    def stop(number, _):
        signal.signal(number, signal.SIG_DFL)
        print(f"{Path(sys.argv[0]).name}: stopped; the same command goes on", file=sys.stderr)
        sys.exit(exit_status(number))

    @wraps(main)
    def until_its_end():
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            sys.exit("this system's loader processes run the script again: put its last lines "
                     "under if __name__ == '__main__':, or set WORKERS = 0")
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a console that has not a caption's characters ends nothing
                stream.reconfigure(errors="backslashreplace")
        handlers = {number: signal.signal(number, stop) for number in signals_here()}
        before = set(opened)
        try:
            refuse_mistyped(main.__globals__, known)
            if "torch._dynamo" in sys.modules:
                torch.compiler.reset()  # what earlier runs in this process compiled counts against this one's
            return main()
        except (ValueError, OSError, RuntimeError, MemoryError, SystemExit) as error:
            mendable = in_one_line(error)
            if mendable is None:
                raise
            traceback.clear_frames(error.__traceback__)  # ends loaders, whose processes would complain at their own end
            raise mendable from (None if mendable is error else error)
        finally:
            gc.enable()
            gc.unfreeze()
            for key in opened.keys() - before:
                close(key)
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return until_its_end


def close(key):
    """Closes what is open under this key, if anything is; a line says where that fails."""
    try:
        opened.pop(key, lambda: None)()
    except Exception as error:  # of a tracker's own kinds
        print(f"{key}: could not be closed ({error})")


def signals_here():
    """The stop signals, where this is the thread that may ask for them."""
    return STOP_SIGNALS if threading.current_thread() is threading.main_thread() else set()


def refuse_mistyped(constants, known):
    """Raises ValueError for an upper-case name that is none of the known ones, with the nearest of these."""
    for name in constants:
        if name.isupper() and name not in known:
            nearest = difflib.get_close_matches(name, known, 1, cutoff=0) or [""]
            raise ValueError(f"{name} = {constants[name]!r}: there is no such constant; {nearest[0]} is the nearest")


def in_one_line(error):
    """The error that says what the user can do: ours as it is, or in place of a library's; None for our mistakes."""
    lines = str(error).strip().splitlines() or [""]
    in_loader = "Caught " in lines[0] and "DataLoader worker process" in lines[0]
    text = lines[-1].removeprefix(f"{type(error).__name__}: ") if in_loader else lines[0]
    if isinstance(error, MemoryError):
        return OSError(f"memory is full; set fewer WORKERS or a smaller BATCH_SIZE ({text[:200]})")
    if isinstance(error, RuntimeError):
        described = f"{type(error).__name__}: {text if in_loader else error}"
        for sign, remedy in REMEDIES.items():
            if sign in described:
                return OSError(f"{remedy} ({text[:200]})")
        return None
    if in_loader:
        return OSError(text) if isinstance(error, OSError) else ValueError(text)
    return error


def collect_stops():
    """The stop signals that come from here on, a list that grows: for work that ends only at places of its own."""
    received = []

    def collect(number, _):
        signal.signal(number, signal.SIG_DFL)
        received.append(number)

    for number in signals_here():
        signal.signal(number, collect)
    return received


def run_script(main):
    """Runs a script's main(). What the user can mend becomes one line that says what, where and the remedy."""
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        of_the_system = isinstance(error, OSError) and error.errno is not None  # the disk is full, or gone
        sys.exit(f"{Path(sys.argv[0]).name}: {error}"
                 + ("; what is done is kept, the same command goes on" if of_the_system else ""))


# ----- how it writes ------------------------------------------------------------------------------
def lock_folder(folder, constant):
    """Claims a folder: until main() ends, or the file that it returns is closed, others are refused with a ValueError.
    Systems and disks without such locks are taken as they are."""
    file = open(folder / "lock", "a+")
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        raise ValueError(f"{folder}: {file.read() or 'another process'} is at work here; wait for "
                         f"its end, or choose another {constant}") from error
    except (ImportError, OSError):  # Windows, or a network disk
        pass
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    opened[folder] = file.close
    return file


def write_atomically(path, write):
    """Calls write(temporary path beside `path`), flushes it to disk and renames: the file is whole or absent."""
    temporary = Path(f"{path}.tmp")
    try:
        write(temporary)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_folder(folder):
    """Removes a folder that is done with, its lock first. What cannot be removed stays, and a line says so."""
    close(folder)
    try:
        shutil.rmtree(folder)
    except OSError as error:
        print(f"{folder}: could not be removed ({error.strerror}), and may be deleted")


def reserve(path, shape, dtype=np.float16):
    """A .npy of zeros with its space on the disk: a memory map that runs out of disk kills the process."""
    np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
            except OSError as error:
                raise ValueError(f"{path}: no room for {os.path.getsize(path):,} bytes ({error.strerror}); make room "
                                 f"or choose another folder") from error
