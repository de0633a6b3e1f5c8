"""HASTE on one screen; it calls model.py, losses.py and teacher.py alone. train.py is the same for runs of days.

    python -m experiments.minimal        # 3.5 minutes on 2 cores; then open out/minimal/samples.png
"""

if not __package__:
    raise SystemExit("run it from the repository's root: python -m experiments.minimal")

import copy
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import fid
from losses import attention_loss, feature_loss
from model import build, interpolate
from teacher import Teacher

OUT, SEED = "out/minimal", 0
STEPS, ALIGN_STEPS = 900, 350  # all of training; phase I, the aligned part of it
BATCH_SIZE, LEARNING_RATE, EMA_DECAY = 32, 3e-3, 0.99
LAYER_PAIRS, FEATURE_WEIGHT, ATTENTION_WEIGHT = [(1, 2), (2, 3)], 0.5, 0.5  # (student, teacher) layers
NULL, LABEL_DROPOUT = 10, 0.1  # "no label", of which guidance leads away
SAMPLE_STEPS, CFG_SCALE, GUIDANCE = 20, 1.5, (0.3, 0.7)  # guidance at these times


def load_data():
    """10,000 images by class: pixels [N, 1, 28, 28] in -1..1, labels [N]; for the teacher uint8 [N, 3, 28, 28]."""
    sheet = torch.from_numpy(np.array(Image.open("data/fashion_mnist.png")))  # 100 x 100 images
    images = sheet.reshape(100, 28, 100, 28).transpose(1, 2).reshape(-1, 1, 28, 28)
    return images / 127.5 - 1, torch.arange(len(images)) // 1000, images.expand(-1, 3, -1, -1)


def draw_steps(count, shape):
    """For each step all that is random: which images, noise, times in 0..1, draws that say which labels to drop."""
    order = torch.cat([torch.randperm(count) for _ in range(STEPS * BATCH_SIZE // count + 1)])  # epoch after epoch
    for rows in order.split(BATCH_SIZE)[:STEPS]:
        yield rows, torch.randn(BATCH_SIZE, *shape), *torch.rand(2, BATCH_SIZE)


def train(x, labels, images):
    """The student's EMA, and of each step its losses: denoising and, in phase I, feature and attention."""
    teacher = Teacher("data/teacher.safetensors", [theirs for _, theirs in LAYER_PAIRS], input_size=28)
    torch.manual_seed(SEED)
    student = build("SiT-T/4", input_size=28, in_channels=1, num_classes=NULL, teacher_dim=teacher.dim)
    optimizer = torch.optim.AdamW(student.parameters(), LEARNING_RATE, weight_decay=0)
    ema, layers, history = copy.deepcopy(student), [ours for ours, _ in LAYER_PAIRS], []
    for step, (rows, noise, t, drop) in enumerate(draw_steps(len(x), x.shape[1:])):
        if step == ALIGN_STEPS:  # the switch: teacher and projector go for good; phase II is plain training
            teacher, layers, student.projectors = None, (), None
        x_t, velocity = interpolate(x[rows], noise, t)  # a point between data and noise, and its velocity
        y = torch.where(drop < LABEL_DROPOUT, NULL, labels[rows])
        predicted, logits, features = student(x_t, t, y, layers, return_features=bool(teacher))
        losses = [(predicted - velocity).square().mean()]
        if teacher:  # phase I: know from x_t what the teacher sees in the clean image, and look where it looks
            teacher_tokens, teacher_logits = teacher(images[rows])
            losses += [FEATURE_WEIGHT * feature_loss(features, teacher_tokens)]
            losses += [ATTENTION_WEIGHT * attention_loss(logits, teacher_logits)]
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for average, weight in zip(ema.parameters(), student.parameters()):
            average.data.lerp_(weight.data, 1 - EMA_DECAY)
        history.append([loss.item() for loss in losses])
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: losses {history[-1]}", flush=True)
    return ema, history


@torch.no_grad()
def sample(model, y):
    """Images uint8 [B, 1, 28, 28] of the classes: Euler's method from noise (t = 1) to data, with guidance."""
    x, times = torch.randn(len(y), 1, 28, 28), torch.linspace(1, 0, SAMPLE_STEPS + 1)
    for t, following in zip(times, times[1:]):
        velocity, _, _ = model(x, t.expand(len(y)), y)
        if GUIDANCE[0] <= t <= GUIDANCE[1]:
            without, _, _ = model(x, t.expand(len(y)), torch.full_like(y, NULL))
            velocity = without + CFG_SCALE * (velocity - without)
        x = x + (following - t) * velocity
    return ((x + 1) * 127.5).clamp(0, 255).byte()


def main():
    x, labels, images = load_data()
    model, _ = train(x, labels, images)
    samples = sample(model, torch.arange(1000) % 10)
    Path(OUT).mkdir(parents=True, exist_ok=True)
    rows = samples[:100].reshape(10, 10, 28, 28).permute(1, 2, 0, 3).reshape(280, 280)  # one class a row
    Image.fromarray(rows.numpy()).save(f"{OUT}/samples.png")
    for name, each in ("samples", samples.expand(-1, 3, -1, -1)), ("real", images):
        np.savez(f"{OUT}/{name}.npz", arr_0=each.permute(0, 2, 3, 1))
    fid.SAMPLES, fid.REFERENCE, fid.FEATURES = f"{OUT}/samples.npz", f"{OUT}/real.npz", "data/judge.safetensors"
    print(f"distance {fid.main()['frechet_distance']:.3f}; now open {OUT}/samples.png")


if __name__ == "__main__":
    main()
