"""Time to quality: what an attempt pays until its samples are as good as plain SiT's after 3,000 steps, by what plain
SiT pays.

    apt-get install dataset-fashion-mnist        # Debian; or see fashion_mnist_networks.py
    python -m experiments.speedrun haste         # one of ATTEMPTS, from the seeds of the report
    python -m experiments.speedrun haste 10      # from these seeds: beside the committed ones
    python -m experiments.speedrun table         # all attempts of RESULTS

An attempt is what differs from compare.py's plain SiT, as train.py's constants. Add one to ATTEMPTS and run it; it
resumes. *Cost to quality* = (preparation + steps of phase I until the distance first falls below the target, times the
cost of such a step + the same of phase II) / the steps of plain SiT, where costs are by that of a step of plain SiT.

Attempts are chosen by what the search's judge says of the search's seed. The report has others of both: its judge is
asked of no run that was chosen by. RESULTS has a row per attempt, seed and step.
"""

if not __package__:
    raise SystemExit("run it from the repository's root: python -m experiments.speedrun")

import csv
import json
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import fid
import model
import train
from class_tokens import CHUNK
from dataset import PreparedDataset
from experiments import compare, draw, reg
from runtime import ends_in_one_line, run_script, write_atomically
from teacher import teacher_for_grid

OUT = "out/speedrun"
RESULTS = compare.HERE / "speedrun.csv"
TARGET = "plain", 3000  # the attempt, and the step, whose mean distance over the seeds is to be reached
STEPS = 2400  # of the others
JUDGED = 8  # times in a run, evenly spaced
SEARCH, REPORT = (0,), (10, 11, 12)  # seeds
JUDGES = {"search": "data/judge.safetensors", "report": "data/report_judge.safetensors"}
PLAIN = dict(ALIGN_STEPS=0)
ATTEMPTS = {
    "plain": dict(PLAIN, STEPS=TARGET[1]),
    # what is aligned, and until when
    "repa": dict(ATTENTION_WEIGHT=0),
    "repa-half": dict(ATTENTION_WEIGHT=0, ALIGN_STEPS=STEPS // 2),
    "attention": dict(FEATURE_WEIGHT=0),
    "haste": dict(ALIGN_STEPS=STEPS // 2),
    "haste-third": dict(ALIGN_STEPS=STEPS // 3),
    "haste-never": {},
    "irepa": dict(ATTENTION_WEIGHT=0, PROJECTOR="conv", SPATIAL_NORM=0.6),
    "reg": dict(ATTENTION_WEIGHT=0, CLASS_WEIGHT=0.03),
    # how it is trained
    "logit-normal": dict(PLAIN, TIMES=(0.0, 1.0)),
    "shift": dict(PLAIN, TIME_SHIFT=2.0),
    "rate-1.5": dict(PLAIN, LEARNING_RATE=4.5e-3, WARMUP_STEPS=100),
    "rate-2": dict(PLAIN, LEARNING_RATE=6e-3, WARMUP_STEPS=100),
    "betas": dict(PLAIN, BETAS=(0.9, 0.95)),
    "ema": dict(PLAIN, EMA_DECAY=0.995),
    "batch-16": dict(PLAIN, BATCH_SIZE=16, STEPS=2 * STEPS),
    "batch-64": dict(PLAIN, BATCH_SIZE=64, STEPS=STEPS // 2),
}
ROUNDS, ROUND = 6, 20  # costs are medians of so many rounds, each of so many steps of plain SiT and of each phase
COLUMNS = ("run", "seed", "step", "distance", "search_distance", "denoising_loss", "phase_1", "phase_2",
           "preparation")


def settings(folder, seed, changes):
    """Sets the scripts' constants for one run."""
    compare.settings(folder, seed, dict(CONFLICT_EVERY=0) | changes)


def judge(samples, out):
    """The distances of a run's samples to the training images: of a search's run in the features of its judge alone."""
    fid.SAMPLES, fid.REFERENCE = str(samples), compare.data_dir()
    fid.BATCH_SIZE, fid.WORKERS = 250, 0
    found = {}
    for name in ["search"] if int(Path(out).parent.name) in SEARCH else JUDGES:
        fid.FEATURES, fid.OUT = JUDGES[name], f"{out}-{name}.json"
        found[name] = fid.main()["frechet_distance"]
    return dict(search_distance=found["search"], distance=found.get("report", ""))


def costs(changes):
    """What a step of an attempt costs in phase_1 and phase_2, and its preparation, all by a step of plain SiT: medians
    of ROUNDS, measured in turn in this process."""
    if changes == PLAIN:
        return dict(phase_1=1, phase_2=1, preparation=0)
    kinds = {"plain": PLAIN, "phase_1": dict(changes, ALIGN_STEPS=10**6), "phase_2": dict(changes, ALIGN_STEPS=0)}
    if changes.get("ALIGN_STEPS") == 0:
        del kinds["phase_1"]
    times = {kind: [] for kind in (*kinds, "preparation")}
    usual = {name: value for name, value in vars(train).items() if name.isupper()}
    with TemporaryDirectory() as runs, open(Path(OUT, "costs.txt"), "w") as output:
        for step in range(ROUND, ROUND * ROUNDS + 1, ROUND):
            for kind, constants in kinds.items():
                with redirect_stdout(output), redirect_stderr(output):
                    vars(train).update(usual)  # of what the kind before has changed
                    settings(Path(runs, kind), 0, dict(constants, STEPS=step, LOG_EVERY=ROUND // 2))
                    train.main()
                with open(Path(runs, kind, "log.csv"), newline="") as file:
                    times[kind].append(float(list(csv.DictReader(file))[-1]["step_ms"]) / 1000)
            times["preparation"].append(seconds_for_class_tokens() if "CLASS_WEIGHT" in changes else 0)
    plain = np.array(times.pop("plain"))
    return {kind: float(np.median(np.array(each) / plain)) for kind, each in times.items()}


def seconds_for_class_tokens():
    """That the teacher takes for those of all training images, as it does for some of them."""
    data = PreparedDataset(train.DATA_DIR)
    teacher = teacher_for_grid(train.TEACHER, [], data.shape[1] // model.MODELS[train.MODEL]["patch_size"])
    images = data.images(range(10 * CHUNK))
    started = time.perf_counter()
    for some in images.split(CHUNK):
        teacher.class_token(some)
    return (time.perf_counter() - started) * len(data) / len(images)


def cost_to_quality(rows, stop, target, column):
    """Of one run, {step: row}: cost until its distance first falls below the target, None where it does not."""
    first = draw.first_below(rows, target, column)
    if first is None:
        return None
    phase_1, phase_2, preparation = (float(next(iter(rows.values())).get(name) or 0) for name in COLUMNS[-3:])
    aligned = min(first, stop)
    return (preparation + aligned * phase_1 + (first - aligned) * phase_2) / TARGET[1]


def report(runs, name, seeds, column):
    """(cost to quality, distance at the end) of an attempt from some seeds, in words."""
    plain, step = TARGET
    target = np.mean([float(runs[plain][seed][step][column]) for seed in (SEARCH if seeds[0] in SEARCH else REPORT)])
    stop = ATTEMPTS[name].get("ALIGN_STEPS", np.inf)
    found = [cost_to_quality(runs[name][seed], stop, target, column) for seed in seeds]
    missed = found.count(None)
    said = f"not reached in {missed} of {len(seeds)} seeds" if missed else draw.spread(np.array(found))
    last = max(runs[name][seeds[0]])
    return said, draw.spread(np.array([float(runs[name][seed][last][column]) for seed in seeds]))


def table():
    """Markdown: the attempts, as the report has them and as the search had."""
    runs, _ = draw.read(RESULTS)
    print("| attempt | cost to quality | by the search's judge | the search's seeds | distance at the end |")
    print("|---|---|---|---|---|")
    for name in runs:
        cells = [report(runs, name, seeds, column) if set(seeds) <= set(runs[name]) else ("", "")
                 for seeds, column in ((REPORT, "distance"), (REPORT, "search_distance"), (SEARCH, "search_distance"))]
        print(f"| {name} | {' | '.join(cost for cost, _ in cells)} | {cells[0][1]} |")


def run_attempt(name, seeds):
    """Trains and judges an attempt from each seed, in pieces that resume; its rows."""
    changes = dict(ATTEMPTS[name])
    end = changes.pop("STEPS", STEPS)
    compare.OUT, compare.RUNS, compare.SEEDS = OUT, {name: changes}, seeds
    compare.STEPS, compare.STOPPED = tuple(end * (i + 1) // JUDGED for i in range(JUDGED)), ()
    compare.SETTINGS, compare.JUDGE, compare.FILES = settings, judge, (__name__,)
    compare.prepare()
    if "CLASS_WEIGHT" in changes:
        reg.write_class_tokens()
    compare.run_all()
    measured = Path(OUT, name, "costs.json")
    if not measured.exists():
        found = costs(changes)
        write_atomically(measured, lambda path: path.write_text(json.dumps(found)))
    found = json.loads(measured.read_text())
    return [json.loads(Path(OUT, name, str(seed), f"{step}.json").read_text()) | found
            for seed in seeds for step in compare.STEPS]


def write(rows):
    """RESULTS with these rows, in place of those of the same attempt and seeds."""
    new = {(row["run"], str(row["seed"])) for row in rows}
    kept = []
    if RESULTS.exists():
        with open(RESULTS, newline="") as file:
            kept = [row for row in csv.DictReader(file) if (row["run"], row["seed"]) not in new]
    order = lambda row: (list(ATTEMPTS).index(row["run"]), int(row["seed"]), int(row["step"]))
    compare.write_rows(RESULTS, sorted(kept + rows, key=order), COLUMNS)


@ends_in_one_line
def main():
    started = time.time()
    name, *seeds = sys.argv[1:] or [""]
    if name not in (*ATTEMPTS, "table") or not all(seed.isdecimal() for seed in seeds):
        raise ValueError(f"say which attempt, and from which seeds if not {REPORT}: {', '.join(ATTEMPTS)}; or table")
    if name == "table":
        return table()
    seeds = tuple(map(int, seeds)) or REPORT
    counted, column = (SEARCH, "search_distance") if seeds[0] in SEARCH else (REPORT, "distance")
    runs = draw.read(RESULTS)[0] if RESULTS.exists() else {}
    if (name, seeds) != (TARGET[0], counted) and not set(counted) <= set(runs.get(TARGET[0], ())):
        raise ValueError(f"{RESULTS} has no rows of {TARGET[0]} from the seeds {counted}, and they are the target; run "
                         f"that first: python -m experiments.speedrun {TARGET[0]} {' '.join(map(str, counted))}")
    rows = run_attempt(name, seeds)
    if seeds == counted:
        write(rows)
    runs = draw.read(RESULTS)[0]
    beside = "; committed: {}" if seeds != counted and set(REPORT) <= set(runs[name]) else ""
    said = report(runs, name, REPORT, column) if beside else ("", "")
    runs[name] = {seed: {row["step"]: row for row in rows if row["seed"] == seed} for seed in seeds}
    cost, distance = report(runs, name, seeds, column)
    print(f"cost to quality: {cost}{beside.format(said[0])}")
    print(f"distance at the end: {distance}{beside.format(said[1])}")
    print(f"elapsed: {time.time() - started:.0f} s")


if __name__ == "__main__":
    run_script(main)
