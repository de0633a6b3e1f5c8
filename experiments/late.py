"""compare.py with a smaller student that trains longer: does alignment come in its way, and does it help to stop it?

    apt-get install dataset-fashion-mnist                     # Debian; or put the four .gz files into IDX_DIR
    python -m experiments.late

One row per run, seed and step in late.csv; draw.py makes figure and tables of them.
"""

if not __package__:
    raise SystemExit("run it from the repository's root: python -m experiments.late")

from experiments import compare
from runtime import run_script

STUDENT = dict(depth=4, hidden_size=64, projector_dim=128)
LAYERS = dict(LAYER_PAIRS=[(1, 2), (2, 3)], ALIGN_DEPTH=3)


def main():
    compare.OUT, compare.RESULTS = "out/late", compare.HERE / "late.csv"
    compare.STUDENT, compare.IMAGES = STUDENT, 2000
    compare.STEPS, compare.STOPS = (1000, 2000, 4000, 8000), (2000,)
    compare.RUNS = {"plain": dict(ALIGN_STEPS=0, **LAYERS), "aligned": dict(KEEP_EVERY=1000, **LAYERS)}
    compare.main()


if __name__ == "__main__":
    run_script(main)
