"""Tokens in bf16 between the blocks (train.RESIDUAL_PRECISION) beside float32, with the products in bf16 in both.

The student and images of compare_small.py, aligned, three seeds; on a CPU, where autocast is switched on for it.

    PYTHONPATH=. python experiments/residual.py
"""

import compare
import train
from prepare_latents import run_script

train.has_bf16 = lambda device: True  # here, so that the processes of the runs find it too


def main():
    compare.SOURCE, compare.OUT = "data/fashion_mnist.png", "out/residual"
    compare.RESULTS = compare.HERE / "residual.csv"
    compare.STEPS, compare.STOPS = (250, 500), ()
    compare.RUNS = {"float32": dict(RESIDUAL_PRECISION="float32"), "bf16": dict(RESIDUAL_PRECISION="bf16")}
    compare.main()


if __name__ == "__main__":
    run_script(main)
