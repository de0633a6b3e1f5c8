"""emoji.py in a reduced form: a smaller student, fewer steps, one seed.

    pip install -r requirements-text.txt
    PYTHONPATH=. python experiments/emoji_small.py

Sets its distances beside the committed ones, emoji_small.csv: seeds 0, 1, 2, by COMMIT = True.
"""

import compare
import draw
import emoji
from compare_small import beside
from prepare_latents import run_script

COMMIT = False  # True: three seeds, written over the committed table


def main():
    emoji.OUT, emoji.FIGURE = "out/emoji_small", "out/emoji_small/emoji.png"
    emoji.STUDENT, emoji.SEEDS = dict(hidden_size=128, num_heads=4), (0, 1, 2) if COMMIT else (0,)
    emoji.STEPS, emoji.STOPS = (400, 800), (400,)
    emoji.RUNS = dict(emoji.RUNS, aligned=dict(KEEP_EVERY=400))
    committed = compare.HERE / "emoji_small.csv"
    emoji.RESULTS = committed if COMMIT else f"{emoji.OUT}/results.csv"
    emoji.main()
    beside(draw.read(emoji.RESULTS)[0], draw.read(committed)[0])


if __name__ == "__main__":
    run_script(main)
