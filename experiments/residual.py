"""Tokens in bf16 between the blocks (train.RESIDUAL_PRECISION) beside float32, with the products in bf16 in both.

The student and images of compare_small.py, aligned, three seeds; on a CPU, where autocast is switched on for it.

    python -m experiments.residual
"""

if not __package__:
    raise SystemExit("run it from the repository's root: python -m experiments.residual")

import train
from experiments import compare
from runtime import run_script


def settings(folder, seed, changes):
    """compare.py's own, and autocast on a CPU."""
    compare.settings(folder, seed, changes)
    train.has_bf16 = lambda device: True


def main():
    compare.SOURCE, compare.OUT = "data/fashion_mnist.png", "out/residual"
    compare.RESULTS, compare.SETTINGS = compare.HERE / "residual.csv", settings
    compare.STEPS, compare.STOPS = (250, 500), ()
    compare.RUNS = {"float32": dict(RESIDUAL_PRECISION="float32"), "bf16": dict(RESIDUAL_PRECISION="bf16")}
    compare.main()


if __name__ == "__main__":
    run_script(main)
