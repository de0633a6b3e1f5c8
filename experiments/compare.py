"""Plain SiT, REPA and HASTE side by side on Fashion-MNIST: the same seeds, noise and data order, judged as they train.

    apt-get install dataset-fashion-mnist                     # Debian; or put the four .gz files into IDX_DIR
    python -m experiments.compare

One row per run, seed and step in RESULTS. Stopped or killed, the same command goes on; with other settings, delete OUT.
draw.py makes figure and tables of the rows.
"""

if not __package__:
    raise SystemExit("run it from the repository's root: python -m experiments.compare")

import csv
import importlib
import json
import os
import shutil
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import connection, get_context
from pathlib import Path

import numpy as np
import torch

import fid
import model
import prepare_latents
import sample
import train
from experiments import fashion_mnist_networks
from runtime import ends_in_one_line, run_script, write_atomically

HERE = Path(__file__).parent
SOURCE = None  # None: all 60,000 images; "data/fashion_mnist.png": the 10,000 that come with the project
OUT = "out/compare"
RESULTS = HERE / "compare.csv"
SEEDS = (0, 1, 2)
STUDENT = dict(depth=8)  # what differs from the demo's SiT-T/4
STEPS = (500, 1000, 2000, 3000)  # at which samples are judged; the last ends the runs
RUNS = {  # what differs from the settings below
    "plain": dict(ALIGN_STEPS=0),
    "features": dict(ATTENTION_WEIGHT=0),  # REPA
    "attention": dict(FEATURE_WEIGHT=0),
    "aligned": dict(KEEP_EVERY=500),  # HASTE that never stops; runs that stop begin at what is kept of it
}
STOPPED, STOPS = ("aligned",), (1000, 2000)  # HASTE: these runs to this step, then plain
IMAGES = 1000  # samples judged, class by class
PROCESSES = 2  # runs at a time, which share the cores
COLUMNS = ("run", "seed", "step", "distance", "precision", "recall", "teacher_distance", "denoising_loss",
           "gradient_cosine", "conflict_step")


def data_dir():
    """The prepared folder of the images to train on."""
    return f"{OUT}/data" if SOURCE else "data/fashion_mnist_60000"


def settings(folder, seed, changes):
    """Sets the scripts' constants for one run."""
    model.MODELS["student"] = dict(model.MODELS["SiT-T/4"], **STUDENT)
    train.DATA_DIR, train.RUN_DIR = data_dir(), str(folder)
    train.WORKERS, train.COMPILE = 0, False
    train.SEED = seed
    train.MODEL, train.TEACHER = "student", "data/teacher.safetensors"
    train.LAYER_PAIRS, train.ALIGN_DEPTH = [(2, 2), (3, 3)], 4
    train.FEATURE_WEIGHT = train.ATTENTION_WEIGHT = 0.5
    train.ALIGN_STEPS = 1_000_000  # aligned to the end
    train.BATCH_SIZE, train.LEARNING_RATE, train.EMA_DECAY = 32, 3e-3, 0.99
    train.LOG_EVERY, train.PREVIEW_EVERY = 10, 0
    train.CHECKPOINT_EVERY, train.CHECKPOINTS_KEPT, train.KEEP_EVERY = 500, 1, 0
    train.CONFLICT_FROM, train.CONFLICT_EVERY, train.CONFLICT_IMAGES = 500, 500, 256
    for name, value in changes.items():
        setattr(train, name, value)
    sample.RUN_DIR, sample.NUM_SAMPLES, sample.BATCH_SIZE = str(folder), IMAGES, 100
    sample.CLASS_SAMPLING, sample.GRID = "balanced", (10, 1)
    sample.MODE, sample.STEPS, sample.CFG_SCALE = "ode", 20, 1.0
    sample.PRECISION = "float32"


def judge(samples, out):
    """Distance, precision and recall in the judge's features and the distance in the teacher's, of images."""
    fid.SAMPLES, fid.REFERENCE = str(samples), data_dir()
    fid.BATCH_SIZE, fid.WORKERS = 250, 0
    measured = {}
    for features in ("judge", "teacher"):
        fid.FEATURES, fid.OUT = f"data/{features}.safetensors", f"{out}-{features}.json"
        measured[features] = fid.main()
    row = {key: measured["judge"][key] for key in ("precision", "recall")}
    return dict(row, distance=measured["judge"]["frechet_distance"],
                teacher_distance=measured["teacher"]["frechet_distance"])


def draw_and_judge(folder, step):
    """Draws samples of the run in a folder as it is at a step; what is measured of them."""
    sample.CHECKPOINT = folder / f"checkpoints/step_{step:07d}/ema.safetensors"
    sample.OUT = folder / f"samples_{step}"
    sample.main()
    return JUDGE(sample.OUT, folder / f"{step}")


SETTINGS, JUDGE, MEASURE = settings, judge, draw_and_judge  # other experiments put in their own ...
FILES = ()  # ... and the files whose constants these use, by __name__: of the one that is started it is "__main__"


def start_from(before, folder, step):
    """Lets a run that has not begun go on from what the run in the folder `before` was at a step."""
    place = f"checkpoints/step_{step:07d}"
    if not list(Path(folder).glob("checkpoints/step_*")):
        shutil.copytree(Path(before, place), Path(folder, f"{place}.copy"), dirs_exist_ok=True)
        os.replace(Path(folder, f"{place}.copy"), Path(folder, place))


def stopped_runs():
    """{name: (the run that it is until it stops, the step of that)}"""
    return {f"{run}, stopped at {stop}".removeprefix("aligned, "): (run, stop) for run in STOPPED for stop in STOPS}


def run(name, seed, changes, before=None, stop=0):
    """Trains one run to each of STEPS in turn and judges it there. With `stop` it goes on, as plain SiT, from what the
    run `before` was at that step: to the bit what it had been, had it been trained so from the start."""
    folder = Path(OUT, name, str(seed))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "a") as output, redirect_stdout(output), redirect_stderr(output):
        SETTINGS(folder, seed, changes)
        if stop:
            start_from(Path(OUT, before, str(seed)), folder, stop)
        for step in STEPS:
            if step > stop and not (folder / f"{step}.json").exists():
                run_to(step, folder, dict(run=name, seed=seed, step=step))


def run_to(step, folder, row):
    """Trains a run to a step, and writes what is measured of it there beside the row's names."""
    train.STEPS = step
    train.main()
    row = row | MEASURE(folder, step) | logged(folder, step)
    write_atomically(folder / f"{step}.json", lambda path: path.write_text(json.dumps(row)))


def logged(folder, step):
    """What a run's log says up to a step."""
    with open(folder / "log.csv", newline="") as file:
        log = {int(line["step"]): line for line in csv.DictReader(file)}
    losses = [float(line["denoising_loss"]) for at, line in log.items() if step - STEPS[0] < at <= step]
    cosines = {at: line["gradient_cosine"] for at, line in log.items() if line["phase"] == "1"}
    conflicts = (at for at, cosine in cosines.items() if cosine and float(cosine) < train.CONFLICT_BELOW)
    return dict(denoising_loss=np.mean(losses), gradient_cosine=cosines.get(step, ""),
                conflict_step=next(conflicts, ""))  # at which TRIGGER "conflict" stops


def constants_now():
    """{file: its constants, as they are now}"""
    constants = {}
    for file in (__name__, *FILES):
        constants[file] = {name: value for name, value in vars(sys.modules[file]).items() if name.isupper()}
    return constants


def run_in_process(constants, *arguments):
    """run() in a process of its own, which has read the files anew: with the constants as main() found them, and its
    share of the cores."""
    for file, values in constants.items():
        vars(importlib.import_module(file)).update(values)
    torch.set_num_threads(max(1, os.cpu_count() // PROCESSES))
    run(*arguments)


def finished(name, seed):
    """Whether a run has been judged for the last time."""
    return Path(OUT, name, str(seed), f"{STEPS[-1]}.json").exists()


def all_jobs():
    """[run()'s arguments], seed by seed, first the runs that others begin as."""
    jobs = []
    for seed in SEEDS:
        jobs += [(name, seed, RUNS[name], None, 0) for name in sorted(RUNS, key=lambda name: name not in STOPPED)]
        for name, (before, stop) in stopped_runs().items():
            jobs.append((name, seed, RUNS[before] | dict(ALIGN_STEPS=stop, KEEP_EVERY=0), before, stop))
    return jobs


def start(job):
    """The process of a run. Ctrl-C is for us, who pass it on."""
    process = get_context("spawn").Process(target=run_in_process, args=(constants_now(), *job))
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.start()
    signal.signal(signal.SIGINT, handler)
    return process


def run_all():
    """All runs, PROCESSES at a time; one that stops begins when the run before is done. A stop lets those that run
    save, then ends the program."""
    # Each process keeps the memory that a step frees for the next one: to hand it back and ask again took a
    # tenth of a step (glibc's allocator)
    os.environ.update(MALLOC_MMAP_THRESHOLD_=str(2**30), MALLOC_TRIM_THRESHOLD_=str(2**32))
    jobs = [job for job in all_jobs() if not finished(*job[:2])]
    running = {}  # by the handle that tells a run's end
    try:
        while jobs or running:
            for job in jobs[:]:
                name, seed, _, before, _ = job
                if len(running) < PROCESSES and (not before or finished(before, seed)):
                    jobs.remove(job)
                    process = start(job)
                    running[process.sentinel] = process, name, seed
            for handle in connection.wait(running):
                process, name, seed = running.pop(handle)
                process.join()
                if not finished(name, seed):
                    raise ValueError(f"{name}, seed {seed}: ended before its last step; {OUT}/{name}/{seed}/output.txt "
                                     f"says why, and the same command goes on")
                print(f"{name}, seed {seed}: done", flush=True)
    finally:
        for process, _, _ in running.values():
            process.terminate()
        for process, _, _ in running.values():
            process.join()


def prepare():
    """The images to train on, and others, which no run sees."""
    Path(OUT).mkdir(parents=True, exist_ok=True)
    if not SOURCE:
        fashion_mnist_networks.NETWORKS = {}  # the images alone
        fashion_mnist_networks.main()
    prepare_latents.IMAGE_SIZE, prepare_latents.VAE, prepare_latents.WORKERS = 28, None, 0
    for source, folder in ((SOURCE, data_dir()), ("data/fashion_mnist_test.png", f"{OUT}/test")):
        if source:
            prepare_latents.SOURCE, prepare_latents.DATA_DIR = source, folder
            prepare_latents.main()


@ends_in_one_line
def main():
    prepare()
    # the floor: as many real images as samples
    collect([dict(run="real images", **judge(f"{OUT}/test", f"{OUT}/real"))])


def collect(rows):
    """Makes all runs, and writes RESULTS: the rows, and one for each run, seed and step."""
    run_all()
    # until it stops a run is the one before
    for name, (before, stop) in (dict.fromkeys(RUNS, (None, 0)) | stopped_runs()).items():
        for seed in SEEDS:
            for step in STEPS:
                judged_as = before if step <= stop else name
                row = json.loads(Path(OUT, judged_as, str(seed), f"{step}.json").read_text())
                rows.append(dict(row, run=name))
    write_rows(RESULTS, rows, COLUMNS)
    print(f"{RESULTS}: {len(rows)} rows")


def write_rows(path, rows, columns):
    """A CSV file of rows, of which it has these columns."""
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        for row in rows:
            table.writerow({key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()})


if __name__ == "__main__":
    run_script(main)
