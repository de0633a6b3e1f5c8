"""Time to quality: what an attempt pays until its samples are as good as plain SiT's after 3,000 steps, by what plain
SiT pays.

    apt-get install dataset-fashion-mnist        # Debian; or see fashion_mnist_networks.py
    python -m experiments.speedrun haste         # one of ATTEMPTS, from the seeds of the report
    python -m experiments.speedrun haste 10      # from these seeds: beside the committed ones
    python -m experiments.speedrun emoji haste   # on reg.py's emoji, for which nothing was chosen
    python -m experiments.speedrun costs         # those of all attempts of RESULTS, measured in turn; emoji costs
    python -m experiments.speedrun table         # all attempts of RESULTS, and the figure (matplotlib); emoji table

An attempt is what differs from compare.py's larger SiT, aligned to the end, as train.py's constants. Add one to
ATTEMPTS and run it; it resumes. *Cost to quality* = (preparation + steps of phase I until the distance first falls
below the target, times the cost of such a step + the same of phase II) / the steps of plain SiT, where costs are by
that of a step of plain SiT.

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
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

import fid
import model
import train
from class_tokens import CHUNK
from dataset import PreparedDataset
from experiments import compare, draw, pixels, reg
from runtime import ends_in_one_line, run_script, write_atomically
from teacher import teacher_for_grid

OUT = "out/speedrun"
RESULTS = compare.HERE / "speedrun.csv"
TARGET = "plain", 3000  # the attempt, and the step, whose mean distance over the seeds is to be reached
STEPS = 2400  # of the others
JUDGED = 6  # times in a run, evenly spaced
SEARCH, REPORT = (0,), (10, 11, 12)  # seeds
JUDGES = {"search": "data/judge.safetensors", "report": "data/report_judge.safetensors"}
COMMON = dict(CONFLICT_EVERY=0)  # to all runs
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
    "rate-1.5": dict(PLAIN, RATE=1.5, WARMUP_STEPS=100),  # times the data set's own LEARNING_RATE
    "rate-2": dict(PLAIN, RATE=2, WARMUP_STEPS=100),
    "betas": dict(PLAIN, BETAS=(0.9, 0.95)),
    "ema": dict(PLAIN, EMA_DECAY=0.995),
    "batch-half": dict(PLAIN, BATCH=0.5, STEPS=2 * STEPS),  # times its own BATCH_SIZE
    "batch-double": dict(PLAIN, BATCH=2, STEPS=STEPS // 2),
    # what these suggest together
    "haste+logit-normal": dict(ALIGN_STEPS=STEPS // 2, TIMES=(0.0, 1.0)),
    "haste-third+logit-normal": dict(ALIGN_STEPS=STEPS // 3, TIMES=(0.0, 1.0)),
    "irepa+logit-normal": dict(ATTENTION_WEIGHT=0, PROJECTOR="conv", SPATIAL_NORM=0.6, TIMES=(0.0, 1.0)),
    "haste+irepa+logit-normal": dict(ALIGN_STEPS=STEPS // 2, PROJECTOR="conv", SPATIAL_NORM=0.6, TIMES=(0.0, 1.0)),
}
# Costs are medians of so many rounds, each of so many steps of plain SiT and of each phase. Where constants change
# nothing of what a step computes it costs what plain SiT's does; those that say how to align change none of phase II
ROUNDS, ROUND = 6, 30
FREE = "STEPS", "ALIGN_STEPS", "RATE", "WARMUP_STEPS", "BETAS", "EMA_DECAY", "TIMES", "TIME_SHIFT"
ALIGNING = "FEATURE_WEIGHT", "ATTENTION_WEIGHT", "PROJECTOR", "SPATIAL_NORM", "ALIGN_DEPTH", "LAYER_PAIRS"
COLUMNS = ("run", "seed", "step", "distance", "search_distance", "denoising_loss", "phase_1", "phase_2",
           "preparation")


def settings(folder, seed, changes):
    """Sets the scripts' constants for one run."""
    changes = COMMON | changes
    rate, batch = changes.pop("RATE", 1), changes.pop("BATCH", 1)
    OWN_SETTINGS(folder, seed, changes)
    train.LEARNING_RATE *= rate
    train.BATCH_SIZE = int(train.BATCH_SIZE * batch)


def judge(samples, out):
    """The distances of a run's samples to the training images: of a search's run in the features of its judge alone."""
    fid.SAMPLES, fid.REFERENCE = str(samples), compare.data_dir()
    fid.BATCH_SIZE, fid.WORKERS = 250, 0
    found = {}
    for name in ["search"] if int(Path(out).parent.name) in SEARCH else JUDGES:
        fid.FEATURES, fid.OUT = JUDGES[name], f"{out}-{name}.json"
        found[name] = fid.main()["frechet_distance"]
    return dict(search_distance=found["search"], distance=found.get("report", ""))


OWN_SETTINGS, JUDGE, PREPARE = compare.settings, judge, compare.prepare


def take_emoji():
    """Sets the constants for emoji: nothing was chosen on them, so they have one judge and the report's seeds alone."""
    global OUT, RESULTS, SEARCH, COMMON, OWN_SETTINGS, JUDGE, PREPARE
    OUT, RESULTS, SEARCH = f"{OUT}_emoji", RESULTS.with_stem(f"{RESULTS.stem}_emoji"), ()
    COMMON = COMMON | reg.EMOJI_SIT
    OWN_SETTINGS, JUDGE, PREPARE = pixels.settings, pixels.judge, partial(reg.prepare_emoji, OUT)


def kinds_of_steps(changes):
    """{phase: constants} of an attempt's steps, less those that change nothing of what a step computes."""
    in_both = {name: value for name, value in changes.items() if name not in FREE + ALIGNING}
    kinds = {"phase_2": PLAIN | in_both}
    if changes.get("ALIGN_STEPS") != 0:
        kinds["phase_1"] = {name: value for name, value in changes.items() if name not in FREE}
    return kinds


def costs(attempts):
    """{name: what its steps cost in phase_1 and phase_2, and its preparation} of attempts {name: constants}, by a step
    of plain SiT: medians of ROUNDS, in which steps of all kinds are measured in turn, in CPU seconds of one thread."""
    kinds = {name: kinds_of_steps(changes) for name, changes in attempts.items()}
    each = {str(PLAIN): PLAIN} | {str(step): step for steps in kinds.values() for step in steps.values()}
    found = {name: dict(phase_2=1, preparation=0) for name in attempts}
    if len(each) == 1:
        return found
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    usual = {name: value for name, value in vars(train).items() if name.isupper()}
    seconds = {kind: [] for kind in each}
    with TemporaryDirectory() as runs, open(Path(OUT, "costs.txt"), "w") as output:
        with redirect_stdout(output), redirect_stderr(output):
            for start in range(0, ROUNDS * (ROUND + 1), ROUND + 1):
                for number, (kind, constants) in enumerate(each.items()):
                    vars(train).update(usual)  # of what the kind before has changed
                    folder = Path(runs, str(number))
                    to_start = cpu_seconds(folder, constants, start + 1)
                    seconds[kind].append((cpu_seconds(folder, constants, start + 1 + ROUND) - to_start) / (ROUND - 1))
    plain = np.array(seconds[str(PLAIN)])
    for name, steps in kinds.items():
        found[name] |= {phase: float(np.median(seconds[str(step)] / plain)) for phase, step in steps.items()}
        if "CLASS_WEIGHT" in attempts[name]:
            found[name]["preparation"] = seconds_for_class_tokens() / np.median(plain)
    torch.set_num_threads(threads)
    return found


def cpu_seconds(folder, changes, step):
    """That a run takes from where it is to a step, its start included."""
    settings(folder, 0, dict(changes, STEPS=step))
    started = time.process_time()
    train.main()
    return time.process_time() - started


def seconds_for_class_tokens():
    """That the teacher takes for those of all training images, as it does for some of them."""
    data = PreparedDataset(train.DATA_DIR)
    teacher = teacher_for_grid(train.TEACHER, [], data.shape[1] // model.MODELS[train.MODEL]["patch_size"])
    images = data.images(range(10 * CHUNK))
    started = time.process_time()
    for some in images.split(CHUNK):
        teacher.class_token(some)
    return (time.process_time() - started) * len(data) / len(images)


def cost_to_quality(rows, stop, target, column):
    """Of one run, {step: row}: cost until its distance first falls below the target, None where it does not."""
    first = draw.first_below(rows, target, column)
    if first is None:
        return None
    phase_1, phase_2, preparation = (float(next(iter(rows.values())).get(name) or 0) for name in COLUMNS[-3:])
    aligned = min(first, stop)
    return (preparation + aligned * phase_1 + (first - aligned) * phase_2) / TARGET[1]


def costs_to_quality(runs, name, seeds, column):
    """An attempt's cost to quality from each of some seeds; None where it is not reached. Of plain SiT, whose mean is
    the target, it is 1, though seeds lie on either side."""
    plain, step = TARGET
    if name == plain:
        return [1.0] * len(seeds)
    target = np.mean([float(runs[plain][seed][step][column]) for seed in (SEARCH if seeds[0] in SEARCH else REPORT)])
    stop = ATTEMPTS[name].get("ALIGN_STEPS", np.inf)
    return [cost_to_quality(runs[name][seed], stop, target, column) for seed in seeds]


def report(runs, name, seeds, column):
    """(cost to quality, distance at the end) of an attempt from some seeds, in words."""
    found = costs_to_quality(runs, name, seeds, column)
    missed = found.count(None)
    if missed:
        said = "not reached" if missed == len(seeds) else f"not reached in {missed} of {len(seeds)} seeds"
    else:
        said = draw.spread(np.array(found))
    last = max(runs[name][seeds[0]])
    return said, draw.spread(np.array([float(runs[name][seed][last][column]) for seed in seeds]))


def table():
    """Markdown: the attempts, as the report has them and as the search had."""
    runs, _ = draw.read(RESULTS)
    columns = {"cost to quality": (0, REPORT, "distance"), "distance at the end": (1, REPORT, "distance")}
    if SEARCH:
        columns |= {"cost by the search's judge": (0, REPORT, "search_distance"),
                    "cost in the search": (0, SEARCH, "search_distance"),
                    "there at the end": (1, SEARCH, "search_distance")}
    print(f"| attempt | {' | '.join(columns)} |")
    print("|---|" + "---|" * len(columns))
    for name in runs:
        cells = [report(runs, name, seeds, column)[which] if set(seeds) <= set(runs[name]) else ""
                 for which, seeds, column in columns.values()]
        print(f"| {name} | {' | '.join(cells)} |")


def draw_attempts(file):
    """A row for each attempt: what it pays, a point per seed, by the judge that counts for it."""
    runs, _ = draw.read(RESULTS)
    figure, axes = draw.canvas(6, 0.25 * len(runs) + 1)
    marks = {"the report's seeds": (REPORT, "distance", "o", "black"),
             "the search's seed": (SEARCH, "search_distance", "x", "C1")}
    for label, (seeds, column, marker, color) in marks.items():
        points = [(cost, row) for row, name in enumerate(runs) if seeds and set(seeds) <= set(runs[name])
                  for cost in costs_to_quality(runs, name, seeds, column)]
        for row in {row for cost, row in points if cost is None}:
            axes.text(0.99, row, "not reached", color=color, ha="right", va="center", fontsize=8)
        reached = [point for point in points if point[0] is not None]
        if reached:
            axes.plot(*np.transpose(reached), marker, color=color, alpha=0.8, label=label)
    axes.axvline(1, color="grey")
    axes.set_yticks(range(len(runs)), runs)
    axes.set(ylim=(len(runs) - 0.5, -0.5), xlabel="cost to quality, by plain SiT's")
    figure.legend(loc="outside upper center", ncols=2, fontsize=9)
    figure.savefig(file, dpi=150)


def prepare(attempts):
    """The images, and their class tokens if an attempt has these."""
    compare.OUT, compare.SETTINGS = OUT, settings
    PREPARE()
    if any("CLASS_WEIGHT" in changes for changes in attempts.values()):
        reg.write_class_tokens()


def run_attempt(name, seeds):
    """Trains and judges an attempt from each seed, in pieces that resume; its rows."""
    changes = dict(ATTEMPTS[name])
    end = changes.pop("STEPS", STEPS)
    compare.RUNS, compare.SEEDS = {name: changes}, seeds
    compare.STEPS, compare.STOPPED = tuple(end * (i + 1) // JUDGED for i in range(JUDGED)), ()
    compare.JUDGE = JUDGE
    compare.FILES = __name__, "experiments.pixels", "experiments.emoji_data"
    compare.PROCESSES = min(compare.PROCESSES, len(seeds))
    prepare({name: changes})
    compare.run_all()
    found = costs_once({name: changes})
    return [json.loads(Path(OUT, name, str(seed), f"{step}.json").read_text()) | found[name]
            for seed in seeds for step in compare.STEPS]


def costs_once(attempts, anew=False):
    """costs() of attempts; of those whose kinds of steps were measured before what was found then, unless anew."""
    path = Path(OUT, "costs.json")
    measured = json.loads(path.read_text()) if path.exists() and not anew else {}
    kinds = {name: str(kinds_of_steps(changes)) for name, changes in attempts.items()}
    new = costs({name: changes for name, changes in attempts.items() if kinds[name] not in measured})
    if new:
        measured |= {kinds[name]: found for name, found in new.items()}
        write_atomically(path, lambda path: path.write_text(json.dumps(measured, indent=1)))
    return {name: measured[kinds[name]] for name in attempts}


def measure_costs():
    """Of all attempts of RESULTS anew, in turn, into their rows."""
    rows = written()
    attempts = {row["run"]: ATTEMPTS[row["run"]] for row in rows}
    prepare(attempts)
    found = costs_once(attempts, anew=True)
    for name, paid in found.items():
        print(f"{name}: {', '.join(f'{what} {cost:.3f}' for what, cost in paid.items())}")
    write([row | found[row["run"]] for row in rows])


def written():
    """RESULTS' rows."""
    with open(RESULTS, newline="") as file:
        return list(csv.DictReader(file))


def write(rows):
    """RESULTS with these rows, in place of those of the same attempt and seeds."""
    new = {(row["run"], str(row["seed"])) for row in rows}
    kept = [row for row in (written() if RESULTS.exists() else []) if (row["run"], row["seed"]) not in new]
    order = lambda row: (list(ATTEMPTS).index(row["run"]), int(row["seed"]), int(row["step"]))
    compare.write_rows(RESULTS, sorted(kept + rows, key=order), COLUMNS)


@ends_in_one_line
def main():
    started = time.time()
    words, data = sys.argv[1:], []
    if words[:1] == ["emoji"]:
        data = [words.pop(0)]
        take_emoji()
    name, *seeds = words or [""]
    if name not in (*ATTEMPTS, "costs", "table") or not all(seed.isdecimal() for seed in seeds):
        raise ValueError(f"say which attempt, and from which seeds if not {REPORT}: {', '.join(ATTEMPTS)}; or costs; "
                         "or table")
    if name == "costs":
        return measure_costs()
    if name == "table":
        table()
        return draw_attempts(f"data/{RESULTS.stem}.png")
    seeds = tuple(map(int, seeds)) or REPORT
    counted, column = (SEARCH, "search_distance") if seeds[0] in SEARCH else (REPORT, "distance")
    runs = draw.read(RESULTS)[0] if RESULTS.exists() else {}
    if (name, seeds) != (TARGET[0], counted) and not set(counted) <= set(runs.get(TARGET[0], ())):
        first = " ".join(map(str, [*data, TARGET[0], *counted]))
        raise ValueError(f"{RESULTS} has no rows of {TARGET[0]} from the seeds {counted}, and they are the target; run "
                         f"that first: python -m experiments.speedrun {first}")
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
