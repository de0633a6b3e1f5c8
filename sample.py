"""Draws images from a trained SiT: a class-by-class grid, and any number of samples for evaluation.

    python sample.py                                           # the run in RUN_DIR, with the constants below
    sample.RUN_DIR = "runs/mine"; sample.main()                # from a Python file of yours

The run's EMA weights say which model, interpolant and VAE they belong to, so nothing is set twice. Each sample depends
on (SEED, its index) alone, not on the batch size or on how many are drawn.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from model import MODELS, SiT
from prepare_latents import load_vae, write_atomically

# what to draw from
RUN_DIR = "runs/haste-xl"
CHECKPOINT = None  # None: the run's EMA; or any ema.safetensors, or the .pt file of a published SiT, REPA or HASTE
VAE = None  # decoder: None is the VAE that the data set was prepared with; or any name that load_vae takes
# what to draw
OUT = "runs/haste-xl/samples"  # folder for samples.png and samples.npz
NUM_SAMPLES = 50_000  # images in samples.npz, class ids in turn; 0: the grid alone
CLASSES = None  # class ids to draw; None: all
GRID = (10, 8)  # rows (the first classes, one each) and columns (samples of the class)
SEED = 0
# how: the paper's sampler for 100 epochs with guidance
MODE = "sde"  # "sde" (Euler-Maruyama) or "ode"
STEPS = 250
HEUN = False  # "ode": second-order steps at twice the cost
CFG_SCALE = 1.825  # classifier-free guidance; 1: none
GUIDANCE = (0.0, 0.6)  # times t at which guidance acts, both ends included
BATCH_SIZE = 64


def seed_from(*numbers):
    """A 64-bit seed from integers that name a random stream, well mixed even when they differ by one."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def path_coefficients(t, path):
    """alpha, sigma of x_t = alpha x + sigma noise, and their derivatives by t, for times t (any shape)."""
    if path == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    if path == "cosine":
        angle = t * (torch.pi / 2)
        return angle.cos(), angle.sin(), -torch.pi / 2 * angle.sin(), torch.pi / 2 * angle.cos()
    raise ValueError(f"unknown path {path!r}; choose 'linear' or 'cosine'")


def score_from_velocity(velocity, x, t, path):
    """Score of p(x_t) from the velocity (SiT, arXiv 2401.08740), all float64; t is a 0-dim tensor."""
    alpha, sigma, d_alpha, d_sigma = path_coefficients(t, path)
    ratio = alpha / d_alpha
    return (ratio * velocity - x) / (sigma**2 - ratio * d_sigma * sigma)


def guided_velocity(velocity, x, t, y, null, cfg_scale, dtype):
    """velocity(x, t, y) in float64, computed in `dtype`; with a cfg_scale other than 1, classifier-free guidance:
    both calls in one batch, then unconditional + scale * (conditional - unconditional)."""
    if cfg_scale != 1:
        x, y = torch.cat([x, x]), torch.cat([y, torch.full_like(y, null)])
    v = velocity(x.to(dtype), torch.full((len(x),), float(t), dtype=dtype, device=x.device), y).double()
    if cfg_scale != 1:
        conditional, unconditional = v.chunk(2)
        v = unconditional + cfg_scale * (conditional - unconditional)
    return v


@torch.no_grad()
def sample_ode(velocity, noise, y, *, steps, null, heun=False, cfg_scale=1.0, guidance=(0.0, 1.0), path="linear"):
    """Follows the probability-flow ODE from noise (t = 1) to data (t = 0) in equal Euler or Heun steps.

    velocity: callable (x, t [B], y) -> v, called in noise's dtype. noise [B, C, H, W]; y [B] class ids; null: the id
    that means "no label". Guidance acts for t in the interval, ends included; Heun decides for both its calls by the
    step's first time, and its last step is plain Euler (EDM's convention, as in REPA). Returns
    float64 latents [B, C, H, W].
    """
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    x = noise.double()
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
        scale = cfg_scale if guidance[0] <= t <= guidance[1] else 1.0
        v = guided_velocity(velocity, x, t, y, null, scale, noise.dtype)
        if heun and i < steps - 1:
            v_next = guided_velocity(velocity, x + (t_next - t) * v, t_next, y, null, scale, noise.dtype)
            v = (v + v_next) / 2
        x = x + (t_next - t) * v
    return x


@torch.no_grad()
def sample_sde(velocity, noise, y, *, steps, null, cfg_scale=1.0, guidance=(0.0, 1.0), path="linear",
               randn_like=torch.randn_like):
    """Follows the reverse SDE with diffusion w(t) = 2 t by Euler-Maruyama, from t = 1 to 0.04, then one step without
    noise to 0 (SiT's and REPA's convention). Arguments as in sample_ode; randn_like(x) gives each step's noise."""
    times = torch.cat([torch.linspace(1, 0.04, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    x = noise.double()
    for t, t_next in zip(times[:-1], times[1:]):
        dt, diffusion = t_next - t, 2 * t
        scale = cfg_scale if guidance[0] <= t <= guidance[1] else 1.0
        v = guided_velocity(velocity, x, t, y, null, scale, noise.dtype)
        # The drift is affine in v with the same x in both calls, so guiding v equals guiding the drift.
        drift = v - diffusion / 2 * score_from_velocity(v, x, t, path)
        if t_next > 0:
            x = x + drift * dt + torch.sqrt(diffusion * dt.abs()) * randn_like(x)
        else:
            x = x + drift * dt
    return x


class IndexedNoise:
    """Standard normal noise in which row i depends on (seed, indices[i]) and the number of earlier draws alone.

    Drawn on the CPU, so that a sample is the same on every device.
    """

    def __init__(self, seed, indices):
        self.generators = [torch.Generator().manual_seed(seed_from(seed, int(index))) for index in indices]

    def draw(self, shape):
        return torch.stack([torch.randn(shape, generator=generator) for generator in self.generators])

    def randn_like(self, x):
        return self.draw(x.shape[1:]).to(x)


@torch.no_grad()
def to_bytes(latents, vae=None, scale=None):
    """Latents [B, C, h, w] (without a VAE: pixels in -1..1) to uint8 [B, 3, H, W], truncated as in ADM's evaluation."""
    x = latents.float()
    if vae is not None:
        x = vae.decode(x / scale)
    return (255 * (x + 1) / 2).clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)


def save_grid(images, columns, path):
    """Writes uint8 [N, 3, H, W] row by row as one PNG, N a multiple of columns."""
    n, c, h, w = images.shape
    grid = images.reshape(n // columns, columns, c, h, w).permute(0, 3, 1, 4, 2)  # [rows, H, columns, W, 3]
    grid = grid.reshape(n // columns * h, columns * w, c)
    write_atomically(path, lambda file: Image.fromarray(grid.cpu().numpy()).save(file, "PNG"))


def save_preview(path, ema, settings, vae, device, grid, steps, seed):
    """Grid of samples with one class a row, always from the same noise so that previews can be compared.

    ema, settings: weights of a SiT and what load_model says of their run; grid: rows, columns; steps: of Euler.
    """
    model = SiT(**settings["sit"]).to(device)
    model.load_state_dict(ema)
    rows, columns, vae_meta = min(grid[0], model.num_classes), grid[1], settings["data"]["vae"]
    noise = IndexedNoise(seed, range(rows * columns)).draw((model.in_channels, model.input_size, model.input_size))
    y = torch.linspace(0, model.num_classes - 1, rows).round().long().repeat_interleave(columns)
    images = [to_bytes(sample_ode(velocity_of(model, device), row_noise.to(device), row_y.to(device), steps=steps,
                                  null=model.num_classes, path=settings["PATH"]), vae, vae_meta and vae_meta["scale"])
              for row_noise, row_y in zip(noise.split(columns), y.split(columns))]
    save_grid(torch.cat(images), columns, path)


def velocity_of(model, device):
    """The model's velocity as a function (x, t, y), in bf16 on a GPU."""
    def velocity(x, t, y):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return model(x, t, y)[0]
    return velocity


def published_settings(state):
    """Settings for a published checkpoint, read off the shapes of its weights."""
    hidden, channels, patch, _ = state["x_embedder.proj.weight"].shape
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    heads = {(m["hidden_size"], m["depth"]): m["num_heads"] for m in MODELS.values()}[hidden, depth]
    sit = dict(input_size=round(state["pos_embed"].shape[1] ** 0.5) * patch, patch_size=patch, in_channels=channels,
               hidden_size=hidden, depth=depth, num_heads=heads,
               num_classes=state["y_embedder.embedding_table.weight"].shape[0] - 1, class_dropout_prob=0.1,
               learn_sigma=state["final_layer.linear.weight"].shape[0] == 2 * patch**2 * channels)
    return dict(sit=sit, PATH="linear", data=dict(vae=dict(name="stabilityai/sd-vae-ft-ema", scale=0.18215)))


def load_model(path):
    """(SiT in eval mode with EMA weights and no projector, its run's settings), ours or of a published checkpoint.

    Raises ValueError where the file is missing, damaged or of another kind.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file; train first, or set RUN_DIR or CHECKPOINT")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                settings = json.loads(file.metadata()["settings"])
                state = {key: file.get_tensor(key) for key in file.keys()}
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            state = checkpoint.get("ema", checkpoint)
            settings = published_settings(state)
        model = SiT(**{**settings["sit"], "teacher_dim": None})
        model.load_state_dict({key: value for key, value in state.items() if not key.startswith("projectors.")})
    except (SafetensorError, OSError, EOFError, KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{path}: not a SiT checkpoint, or damaged ({str(error).splitlines()[0]}); "
                         f"copy or train it again") from error
    return model.eval().requires_grad_(False), settings


def main():
    model, settings = load_model(CHECKPOINT or Path(RUN_DIR) / "ema.safetensors")
    classes = list(range(model.num_classes)) if CLASSES is None else list(CLASSES)
    if not classes or min(classes) < 0 or max(classes) >= model.num_classes:
        raise ValueError(f"CLASSES {classes} must name at least one of the model's classes 0..{model.num_classes - 1}")
    if MODE not in ("sde", "ode"):
        raise ValueError(f"unknown MODE {MODE!r}; choose 'sde' or 'ode'")
    if CFG_SCALE != 1 and len(model.y_embedder.embedding_table.weight) == model.num_classes:
        raise ValueError(f"CFG_SCALE {CFG_SCALE} needs a model trained with LABEL_DROPOUT; set it to 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae_meta, vae, scale = settings["data"]["vae"], None, None
    if vae_meta is not None:
        vae, scale = load_vae(VAE or vae_meta["name"])[0].to(device), vae_meta["scale"]
    model.to(device)

    velocity = velocity_of(model, device)

    # Sample i is of class classes[i % K], so row r, column c of the grid is sample c K + r: nothing is drawn twice.
    rows, columns = min(GRID[0], len(classes)), GRID[1]
    in_grid = [c * len(classes) + r for r in range(rows) for c in range(columns)]
    indices = torch.tensor(sorted({*range(NUM_SAMPLES), *in_grid}))
    out, shape = Path(OUT), (model.in_channels, model.input_size, model.input_size)
    out.mkdir(parents=True, exist_ok=True)
    drawn, shown = None, {}
    unfinished = out / f"samples.tmp{os.getpid()}.npy"  # on disk: 50,000 images of 256 x 256 are 9.8 GB
    with tqdm(total=len(indices), unit="img", desc="sampling") as bar:
        for batch in indices.split(BATCH_SIZE):
            noise = IndexedNoise(SEED, batch)
            x = noise.draw(shape).to(device)
            y = torch.tensor([classes[i % len(classes)] for i in batch.tolist()], device=device)
            options = dict(steps=STEPS, null=model.num_classes, cfg_scale=CFG_SCALE, guidance=GUIDANCE,
                           path=settings["PATH"])
            if MODE == "sde":
                latents = sample_sde(velocity, x, y, randn_like=noise.randn_like, **options)
            else:
                latents = sample_ode(velocity, x, y, heun=HEUN, **options)
            images = to_bytes(latents, vae, scale).cpu()
            if NUM_SAMPLES:
                if drawn is None:
                    drawn = np.lib.format.open_memmap(unfinished, "w+", np.uint8, (NUM_SAMPLES, *images.shape[2:], 3))
                kept = batch < NUM_SAMPLES
                drawn[batch[kept].numpy()] = images[kept].permute(0, 2, 3, 1).numpy()
            shown.update({i: image for i, image in zip(batch.tolist(), images) if i in in_grid})
            bar.update(len(batch))

    save_grid(torch.stack([shown[i] for i in in_grid]), columns, out / "samples.png")
    print(f"{out / 'samples.png'}: {rows} classes by {columns} samples")
    if NUM_SAMPLES:
        def write(path):
            with open(path, "wb") as file:
                np.savez(file, arr_0=drawn)
        write_atomically(out / "samples.npz", write)
        unfinished.unlink()
        print(f"{out / 'samples.npz'}: arr_0 {list(drawn.shape)} uint8, classes in turn")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # bad input: its one line says what, where and the remedy
        sys.exit(f"sample.py: {error}")
