"""The whole pipeline in a few minutes on a laptop without a GPU: prepare, train in two phases, sample, evaluate.

    python demo.py

10,000 Fashion-MNIST images, SiT-T/4, a teacher and a judge that lie in data/. Everything goes to out/demo/; open
out/demo/samples.png. Run again, it resumes; delete out/demo to start over. An experiment of yours can begin as a copy.
"""

import csv
import json
import signal
import time
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the rest is imported

import fid
import prepare_latents
import sample
import train
from runtime import run_script, write_atomically

HERE = Path(__file__).parent / "data"
OUT = "out/demo"


def settings():
    """Sets the constants of every script for the demo."""
    prepare_latents.SOURCE, prepare_latents.DATA_DIR = str(HERE / "fashion_mnist.png"), f"{OUT}/data"
    prepare_latents.IMAGE_SIZE, prepare_latents.VAE = 28, None  # pixels: no VAE, 7 x 7 patches
    prepare_latents.BATCH_SIZE, prepare_latents.WORKERS = 256, 0

    train.DATA_DIR, train.RUN_DIR, train.WORKERS = f"{OUT}/data", f"{OUT}/run", 0
    train.MODEL, train.TEACHER = "SiT-T/4", str(HERE / "teacher.safetensors")
    train.LAYER_PAIRS, train.ALIGN_DEPTH = [(1, 2), (2, 3)], 3
    train.ALIGN_STEPS, train.STEPS, train.BATCH_SIZE, train.TIMES = 750, 1100, 32, (0.0, 1.0)
    train.LEARNING_RATE, train.EMA_DECAY, train.COMPILE = 3e-3, 0.99, False
    train.LOG_EVERY, train.CHECKPOINT_EVERY, train.PREVIEW_EVERY = 50, 400, 600
    train.PREVIEW_GRID, train.PREVIEW_STEPS = (10, 4), 20
    train.CONFLICT_FROM, train.CONFLICT_EVERY, train.CONFLICT_IMAGES = 400, 400, 64

    sample.RUN_DIR, sample.OUT, sample.NUM_SAMPLES, sample.BATCH_SIZE = f"{OUT}/run", OUT, 1000, 100
    sample.MODE, sample.STEPS, sample.CFG_SCALE, sample.GUIDANCE = "ode", 20, 2.5, (0.3, 0.7)
    sample.CLASS_SAMPLING, sample.COMPILE = "balanced", False

    fid.SAMPLES, fid.REFERENCE, fid.OUT = f"{OUT}/samples.npz", f"{OUT}/data", f"{OUT}/distance_samples.json"
    fid.FEATURES, fid.BATCH_SIZE, fid.WORKERS = str(HERE / "judge.safetensors"), 250, 0


def main():
    started = time.time()
    settings()
    prepare_latents.main()
    train.main()
    sample.main()
    drawn = fid.main()

    # the floor: held-out real images, as many as samples, against the same training images
    prepare_latents.SOURCE, prepare_latents.DATA_DIR = str(HERE / "fashion_mnist_test.png"), f"{OUT}/test_data"
    prepare_latents.main()
    fid.SAMPLES, fid.OUT = f"{OUT}/test_data", f"{OUT}/distance_real.json"
    real = fid.main()

    with open(f"{OUT}/run/log.csv", newline="") as file:
        log = [{key: float(value or "nan") for key, value in row.items()} for row in csv.DictReader(file)]
    phases = {}
    for phase in (1, 2):
        rows = [row for row in log if row["phase"] == phase]
        last = rows[-1]
        phases[phase] = dict(images_per_s=len(rows) / sum(1 / row["images_per_s"] for row in rows), steps=last["step"],
                             **{key: last[key] for key in ("denoising_loss", "feature_loss", "attention_loss")})
    metrics = dict(phase_1=phases[1], phase_2=phases[2], label=drawn["label"], distance=drawn["frechet_distance"],
                   distance_of_real_images=real["frechet_distance"], precision=drawn["precision"],
                   recall=drawn["recall"], seconds=time.time() - started)
    write_atomically(f"{OUT}/metrics.json", lambda path: path.write_text(json.dumps(metrics, indent=1)))

    print("\n            until step   images/s   denoising   feature   attention")
    for phase, name in ((1, "phase I "), (2, "phase II")):
        p = phases[phase]
        print(f"  {name}  {p['steps']:>10.0f}  {p['images_per_s']:>9.0f}  {p['denoising_loss']:>10.4f}  "
              f"{p['feature_loss']:>8.3f}  {p['attention_loss']:>10.3f}")
    print(f"\n  {drawn['label']}, to the 10,000 training images:\n"
          f"    1,000 samples      {drawn['frechet_distance']:8.3f}\n"
          f"    1,000 test images  {real['frechet_distance']:8.3f}   (the floor)\n"
          f"\n  {metrics['seconds']:.0f} s. Now open {OUT}/samples.png: one class a row.")


if __name__ == "__main__":
    run_script(main)
