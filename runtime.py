"""How every script starts, stops, refuses and writes: processes and devices, stop signals, errors
that say what to do, checks of constants, locks, files that are whole or absent."""

import gc
import itertools
import multiprocessing
import numbers
import os
import platform
import re
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
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        join_processes(rank, world, device if nccl and device.type == "cuda" else None)
    elif nccl and has_bf16(device) and dist.is_nccl_available() and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl", rank=0, world_size=1, store=dist.HashStore())
    return rank, world, device


def join_processes(rank, world, gpu):
    """Joins torchrun's processes, by NCCL too where they have a GPU each."""
    # their store still has the addresses of another main() before, and torchrun restarts one node's
    # processes with the store of the attempt before
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0) if one_node else 0
    store, _, _ = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"{restarts}, {next(joined)}", store)
    patience = timedelta(hours=1 if gpu else 24)  # without NCCL one may have much more to do than the others
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", rank=rank, world_size=world,
                            store=store, device_id=gpu, timeout=patience)


def has_bf16(device):
    """Whether a device computes in bf16: GPUs of compute capability 8 (Ampere) on; others emulate it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


# ----- how a script ends --------------------------------------------------------------------------
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
    a second one at once. What libraries raise and the user can mend becomes an OSError with a remedy."""
    def stop(number, _):
        signal.signal(number, signal.SIG_DFL)
        print(f"{Path(sys.argv[0]).name}: stopped; the same command goes on", file=sys.stderr)
        sys.exit(exit_status(number))

    @wraps(main)
    def until_its_end():
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            sys.exit("this system's loader processes run the script again: put its last lines "
                     "under if __name__ == '__main__':, or set WORKERS = 0")
        here = threading.current_thread() is threading.main_thread()  # signals are of no other thread
        handlers = {number: signal.signal(number, stop) for number in STOP_SIGNALS if here}
        try:
            return main()
        except (ValueError, OSError, RuntimeError, SystemExit) as error:
            mendable = in_one_line(error)
            if mendable is None:
                raise
            traceback.clear_frames(error.__traceback__)  # ends loaders, whose processes would complain at their own end
            raise mendable from (None if mendable is error else error)
        finally:
            gc.enable()
            gc.unfreeze()
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return until_its_end


def in_one_line(error):
    """The error that says what the user can do: ours as it is, or in place of a library's; None for our mistakes."""
    lines = str(error).strip().splitlines() or [""]
    in_loader = "Caught " in lines[0] and "DataLoader worker process" in lines[0]
    text = lines[-1].removeprefix(f"{type(error).__name__}: ") if in_loader else lines[0]
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

    for number in STOP_SIGNALS:
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


# ----- what a script refuses ----------------------------------------------------------------------
def check_constants(constants, rules, **choices):
    """Checks a script's constants, globals(), before any work: {rule: names}, and for each other name its choices.
    Rules are "[two] [whole] number[s] from|above A [to B] [or None]", "True or False", "path [or None]".

    Whole floats become ints, None becomes 0 where that is allowed, ~ is expanded. Raises ValueError
    that names the constant, its value and what is allowed.
    """
    for name, allowed in choices.items():
        if not any(constants[name] == choice for choice in allowed):
            raise ValueError(f"unknown {name} {constants[name]!r}; choose one of {', '.join(map(str, allowed))}")
    for rule, names in rules.items():
        for name in names.split():
            constants[name] = checked(name, constants[name], rule)


def checked(name, value, rule):
    """A constant's value as its script takes it. Raises ValueError where the rule does not allow it."""
    refused = ValueError(f"{name} = {value!r}; allowed: {rule}")
    if value is None and rule.endswith("or None"):
        return None
    if rule == "True or False":
        if not isinstance(value, bool):
            raise refused
        return value
    if rule.startswith("path"):
        if not isinstance(value, (str, os.PathLike)) or not str(value):
            raise refused
        return os.path.expanduser(value)

    two, whole, many, bound, low, high = re.match(
        r"(two )?(whole )?number(s)? (from|above) (\S+)(?: to (\S+))?", rule).groups()
    found = list(value) if many and isinstance(value, (tuple, list)) else [value]
    if whole and low == "0":  # None stands for never, or none
        found = [0 if each is None else each for each in found]

    def is_good(number):
        if not isinstance(number, numbers.Real) or isinstance(number, bool):
            return False
        inside = float(low) <= number <= float(high or 1e300)
        return inside and (bound == "from" or number > float(low)) and (not whole or number % 1 == 0)

    if not found or (two and len(found) != 2) or not all(map(is_good, found)):
        raise refused
    found = tuple(int(each) if whole else each for each in found)
    return found if many else found[0]


def refuse_other(folder, state, found, wanted, constant="DATA_DIR"):
    """Raises ValueError that names what differs between a folder's settings and this run's."""
    differing = [f"{key} {found.get(key)!r}, now {wanted[key]!r}" for key in wanted if found.get(key) != wanted[key]]
    if differing:
        raise ValueError(f"{folder}: {state} with other settings ({'; '.join(differing)}); "
                         f"set them back, choose another {constant} or delete the folder")


def lock_folder(folder, constant):
    """Claims a folder: until the file that it returns is closed, at the latest when the process ends, others are
    refused with a ValueError. Systems and disks without such locks are taken as they are."""
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
    return file


# ----- how it writes ------------------------------------------------------------------------------
def check_writable(path):
    """Raises now what writing the file after hours of work would raise."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if Path(path).is_dir():
        raise ValueError(f"{path}: is a folder; set OUT to a file's path")
    with open(f"{path}.tmp", "wb"):
        os.remove(f"{path}.tmp")


def write_atomically(path, write):
    """Calls write(temporary path beside `path`), flushes it to disk and renames: the file is whole
    or absent. What a killed process leaves, the next one writes over."""
    temporary = Path(f"{path}.tmp")
    try:
        write(temporary)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
