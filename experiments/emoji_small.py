"""emoji.py in a reduced form: the first half of its first seed, where nothing has stopped yet; the distances are set
beside the committed ones.

    pip install -r requirements-text.txt
    python -m experiments.emoji_small
"""

if not __package__:
    raise SystemExit("run it from the repository's root: python -m experiments.emoji_small")

from experiments import compare, draw, emoji
from experiments.compare_small import beside
from runtime import run_script


def main():
    emoji.OUT, emoji.RESULTS, emoji.FIGURE = (f"out/emoji_small{end}" for end in ("", "/results.csv", "/emoji.png"))
    emoji.SEEDS, emoji.STEPS, emoji.STOPS = (0,), (1500,), ()
    emoji.main()
    beside(draw.read(emoji.RESULTS)[0], draw.read(compare.HERE / "emoji.csv")[0])


if __name__ == "__main__":
    run_script(main)
