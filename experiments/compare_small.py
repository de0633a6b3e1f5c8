"""compare.py in a reduced form: the 10,000 images that come with the project, 500 steps, one seed.

    PYTHONPATH=. python experiments/compare_small.py

Sets its table beside the committed one, compare_small.csv: the same with seeds 0, 1, 2, by COMMIT = True.
"""

import compare
import draw

COMMIT = False  # True: three seeds, written over the committed table


def main():
    compare.SOURCE, compare.OUT = "data/fashion_mnist.png", "out/compare_small"
    compare.SEEDS, compare.STEPS, compare.STOPS = (0,), (250, 500), (250,)
    compare.RUNS = dict(compare.RUNS, aligned=dict(KEEP_EVERY=250))
    del compare.RUNS["attention"]
    committed = compare.HERE / "compare_small.csv"
    compare.RESULTS = committed if COMMIT else f"{compare.OUT}/results.csv"
    if COMMIT:
        compare.SEEDS = (0, 1, 2)
    compare.main()
    found, expected = draw.read(compare.RESULTS)[0], draw.read(committed)[0]
    print(f"{'run':16}{'step':>6}{'distance':>10}{'committed: mean (lowest to highest)':>38}")
    for run, seeds in found.items():
        for step, row in seeds[compare.SEEDS[0]].items():
            print(f"{run:16}{step:>6}{float(row['distance']):>10.2f}"
                  f"{draw.spread(draw.values(expected, run, step)):>38}")


if __name__ == "__main__":
    main()
