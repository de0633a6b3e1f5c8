"""compare.py in a reduced form: the 10,000 images that come with the project, 500 steps, one seed.

    python -m experiments.compare_small

Sets its distances beside the committed ones, compare_small.csv: seeds 0, 1, 2 and attention alone, by COMMIT = True.
"""

if not __package__:
    raise SystemExit("run it from the repository's root: python -m experiments.compare_small")

from scipy.stats import t as students_t

from experiments import compare, draw
from runtime import run_script

COMMIT = False  # True: three seeds, written over the committed table


def beside(found, committed):
    """Prints each distance of seed 0 beside the committed seeds' mean and the range around it in which another run
    of the same kind falls 19 times in 20, if distances are spread normally."""
    print(f"{'run':16}{'step':>6}{'distance':>10}{'committed':>18}")
    for run, seeds in found.items():
        for step, row in seeds[0].items():
            numbers, distance = draw.values(committed, run, step), float(row["distance"])
            mean, count = numbers.mean(), len(numbers)
            width = students_t.ppf(0.975, count - 1) * numbers.std(ddof=1) * (1 + 1 / count) ** 0.5
            verdict = "" if abs(distance - mean) <= width else "  outside"
            print(f"{run:16}{step:>6}{distance:>10.2f}{mean:>10.2f} +- {width:.2f}{verdict}")


def main():
    compare.SOURCE, compare.OUT = "data/fashion_mnist.png", "out/compare_small"
    compare.STEPS, compare.STOPS = (250, 500), (250,)
    compare.RUNS = dict(compare.RUNS, aligned=dict(KEEP_EVERY=250))
    committed = compare.HERE / "compare_small.csv"
    if COMMIT:
        compare.SEEDS, compare.RESULTS = (0, 1, 2), committed
    else:
        compare.SEEDS, compare.RESULTS = (0,), f"{compare.OUT}/results.csv"
        del compare.RUNS["attention"]
    compare.main()
    beside(draw.read(compare.RESULTS)[0], draw.read(committed)[0])


if __name__ == "__main__":
    run_script(main)
