"""Draws images from a trained SiT, MMDiT or JiT: samples for evaluation, and pictures to look at.

    python sample.py                                           # the run in RUN_DIR, as set below
    torchrun --nproc_per_node=8 sample.py                      # the same images, on eight GPUs
    sample.RUN_DIR = "runs/mine"; sample.main()                # from a Python file of yours

The weights say which model, interpolant and VAE they belong to, so nothing is set twice. Each sample depends on (SEED,
its index) alone, not on the batch size, the number of GPUs or how many are drawn. Killed, the same command goes on.
"""

import json
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the rest is imported

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from scipy.integrate import RK45
from tqdm import tqdm

from checkpoint import load_model
from checks import check_constants, refuse_other, weights_checksum
from dataset import PreparedDataset
from model import make_network, path_coefficients, unpack
from runtime import (
    ends_in_one_line,
    has_bf16,
    lock_folder,
    remove_folder,
    reserve,
    run_script,
    start_processes,
    write_atomically,
)
from text import CaptionTable, TextEncoder
from vae import load_decoder, normalisation

# what to draw from
RUN_DIR = "runs/haste-xl"
CHECKPOINT = None  # None: the run's EMA; or another's, or the file of a published SiT, REPA, HASTE, REG or JiT
VAE = None  # decoder: None is the VAE that the data were prepared with; or a name that load_vae takes
TEXT_ENCODER = None  # None: the model's own, by its name; or where that lies now
EMA = None  # of a published JiT: None is its "model_ema1", of decay 0.9999; or "model_ema2", of 0.9996
# what to draw
OUT = None  # folder for samples.npz and pictures; None: "samples" in RUN_DIR
NUM_SAMPLES = 50_000  # images in samples.npz; 0: pictures alone
CLASS_SAMPLING = "uniform"  # classes at random, as in the papers; "data": as often as trained on; "balanced": in turn
CLASSES = None  # class ids to draw; None: all
PROMPTS = None  # for a model of text: a list of texts; or a prepared folder: of each image one caption
SEED = 0
PNGS = False  # True: every sample as a file in OUT/png too
# pictures, one class of CLASSES or one of PROMPTS a row
GRID = (10, 8)  # samples.png: rows and columns; None: none
COMPARE = ()  # compare.png: one noise through each of these, either CFG_SCALEs or CHECKPOINTs
FRAMES = 0  # path.png: so many moments on the way from noise to image
# how: the paper's sampler for 100 epochs with guidance
MODE = "sde"  # "sde" (Euler-Maruyama) or "ode"
SOLVER = "euler"  # of the ODE: "euler"; "heun", second order, twice the cost; "adaptive", Dormand-Prince 5(4)
STEPS = 250  # of all but "adaptive", whose steps follow TOLERANCE
TOLERANCE = 1e-3
SPACING = 1.0  # of times: 1, equal; s > 1, denser at the noise, t -> s t / (1 + (s - 1) t); "log": at data
CFG_SCALE = 1.825  # classifier-free guidance; 1: none
GUIDANCE = (0.0, 0.6)  # times t at which guidance acts, both ends included
# speed
BATCH_SIZE = 64
PRECISION = "bf16"  # of the network on a GPU, or "float32"; the sampler's state is float64
COMPILE = True  # on a GPU


def seed_from(*numbers):
    """A 64-bit seed from integers that name a random stream, well mixed even if they differ by one."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def score_from_velocity(velocity, x, t, path):
    """Score of p(x_t) from the velocity (SiT, arXiv 2401.08740), all float64; t is a 0-dim tensor."""
    alpha, sigma, d_alpha, d_sigma = path_coefficients(t, path)
    ratio = alpha / d_alpha
    return (ratio * velocity - x) / (sigma**2 - ratio * d_sigma * sigma)


def guided_velocity(velocity, x, t, y, null, scale, dtype):
    """velocity(x, t, y) in float64, computed in `dtype`. Rows whose scale is not 1 get classifier-free guidance: once
    more with "no label", in the same batch, then unconditional + scale * (conditional - unconditional). t and scale:
    numbers or float64 [B], on the CPU."""
    t, scale = (torch.as_tensor(value, dtype=torch.float64).expand(len(x)) for value in (t, scale))
    guided = (scale != 1).nonzero().flatten()
    t, more = torch.cat([t, t[guided]]).to(x.device, dtype), guided.to(x.device)
    v = velocity(torch.cat([x, x[more]]).to(dtype), t, torch.cat([y, torch.full_like(y[more], null)])).double()
    v, unconditional = v[: len(x)], v[len(x) :]
    if len(guided):
        scale = scale[guided].view(-1, 1, 1, 1).to(v.device)
        v = v.index_copy(0, more, unconditional + scale * (v[more] - unconditional))
    return v


def scale_at(t, cfg_scale, guidance, open_ends=False):
    """The guidance scale at times t, a float64 tensor: cfg_scale inside the interval, 1 outside.
    Its ends belong to it, unless they are open: then all but t = 1 do not."""
    low, high = guidance
    inside = (t > low) & ((t < high) | (high == 1)) if open_ends else (t >= low) & (t <= high)
    return torch.where(inside, cfg_scale, 1.0)


def step_times(count, last, spacing):
    """`count` decreasing float64 times from 1 to `last`. spacing as SPACING; "log" needs last > 0."""
    if spacing == "log":
        return torch.logspace(0, np.log10(last), count, dtype=torch.float64)
    t = torch.linspace(1, 0, count, dtype=torch.float64)
    return last + (1 - last) * (spacing * t / (1 + (spacing - 1) * t))


@torch.no_grad()
def sample_ode(velocity, noise, y, *, steps, null, heun=False, cfg_scale=1.0, guidance=(0.0, 1.0), path="linear",
               spacing=1.0, per_call=False):
    """Follows the probability-flow ODE from noise (t = 1) to data (t = 0) in Euler or Heun steps.

    velocity: callable (x, t [B], y) -> v, called in noise's dtype. noise [B, C, H, W]; y [B] class ids; null: the id
    that means "no label". Guidance acts for t in the interval, ends included; Heun decides for both its calls by the
    step's first time, and its last step is plain Euler (EDM's convention, as in REPA). With per_call it decides for
    each call by that call's time, ends left out (JiT's convention). spacing: see SPACING; "log" goes to 0.04, then to
    0. Returns float64 latents [B, C, H, W].
    """
    to_zero = F.pad(step_times(steps, 0.04, spacing), (0, 1))
    times = to_zero if spacing == "log" else step_times(steps + 1, 0.0, spacing)
    x = noise.double()
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
        scale = scale_at(t, cfg_scale, guidance, per_call)
        v = guided_velocity(velocity, x, t, y, null, scale, noise.dtype)
        if heun and i < steps - 1:
            scale = scale_at(t_next, cfg_scale, guidance, True) if per_call else scale
            v_next = guided_velocity(velocity, x + (t_next - t) * v, t_next, y, null, scale, noise.dtype)
            v = (v + v_next) / 2
        x = x + (t_next - t) * v
    return x


@torch.no_grad()
def sample_adaptive(velocity, noise, y, *, null, tolerance=1e-3, cfg_scale=1.0, guidance=(0.0, 1.0)):
    """Follows the same ODE by Dormand-Prince 5(4) (scipy's RK45), each sample in steps of its own, so that none depends
    on its batch. tolerance: of a step's error, relative to the state; a thousandth of it absolute. Else as sample_ode.
    """
    A, B, C, E = RK45.A, RK45.B, RK45.C, RK45.E
    x, result = noise.double(), torch.empty_like(noise, dtype=torch.float64)
    at, t = torch.arange(len(y)), torch.ones(len(y), dtype=torch.float64)
    h = torch.full_like(t, 0.05)
    ends = torch.tensor([0.0, *guidance] if cfg_scale != 1 else [0.0], dtype=torch.float64)

    def slope(x, t, start):  # guidance is a jump in time: a step ends there, and is all on one side of it
        scale = scale_at(start - 1e-9, cfg_scale, guidance)
        return -guided_velocity(velocity, x, t, y, null, scale, noise.dtype)

    def mix(weights, slopes):
        return h.view(-1, 1, 1, 1).to(x.device) * sum(w * k for w, k in zip(weights, slopes) if w)

    first = slope(x, t, t)
    while len(at):
        end = torch.where(ends < t[:, None], ends, -1).amax(dim=1)
        h = torch.minimum(h, t - end)
        t_next = torch.where(h == t - end, end, t - h)
        slopes = [first]
        for weights, c in zip(A[1:], C[1:]):
            slopes.append(slope(x + mix(weights, slopes), t - c * h, t))
        ahead = x + mix(B, slopes)
        slopes.append(slope(ahead, t_next, t))
        allowed = tolerance * (torch.maximum(x.abs(), ahead.abs()) + 1e-3)
        error = (mix(E, slopes) / allowed).square().mean(dim=(1, 2, 3)).sqrt().cpu()
        good = error <= 1
        t, rows = torch.where(good, t_next, t), good.view(-1, 1, 1, 1).to(x.device)
        x, first = torch.where(rows, ahead, x), torch.where(rows, slopes[-1], first)
        h = h * (0.9 * error.clamp(min=1e-10) ** -0.2).clamp(0.2, 5)
        result[at[t == 0].to(x.device)] = x[(t == 0).to(x.device)]
        going = t > 0
        at, t, h = at[going], t[going], h[going]
        x, first, y = (each[going.to(x.device)] for each in (x, first, y))
        if torch.isin(t, ends).any():
            first = slope(x, t, t)
    return result


@torch.no_grad()
def sample_sde(velocity, noise, y, *, steps, null, cfg_scale=1.0, guidance=(0.0, 1.0), path="linear", spacing=1.0,
               randn_like=torch.randn_like):
    """Follows the reverse SDE with diffusion w(t) = 2 t by Euler-Maruyama, from t = 1 to 0.04, then one step without
    noise to 0 (SiT's and REPA's convention). Arguments as in sample_ode; randn_like(x) gives each step's noise."""
    times = F.pad(step_times(steps, 0.04, spacing), (0, 1))  # and then 0
    x = noise.double()
    for t, t_next in zip(times[:-1], times[1:]):
        dt, diffusion = t_next - t, 2 * t
        v = guided_velocity(velocity, x, t, y, null, scale_at(t, cfg_scale, guidance), noise.dtype)
        # The drift is affine in v with the same x in both calls, so guiding v equals guiding the drift.
        drift = v - diffusion / 2 * score_from_velocity(v, x, t, path)
        if t_next > 0:
            x = x + drift * dt + torch.sqrt(diffusion * dt.abs()) * randn_like(x)
        else:
            x = x + drift * dt
    return x


class IndexedNoise:
    """Standard normal noise in which row i depends on (seed, indices[i]) and the number of earlier draws
    alone; from the CPU, so that a sample is the same on every device."""

    def __init__(self, seed, indices):
        self.generators = [torch.Generator().manual_seed(seed_from(seed, int(index))) for index in indices]

    def draw(self, shape):
        return torch.stack([torch.randn(shape, generator=generator) for generator in self.generators])

    def randn_like(self, x):
        return self.draw(x.shape[1:]).to(x)


@torch.no_grad()
def to_bytes(latents, vae=None, scale=1.0, shift=0.0):
    """Latents [B, C, h, w] (without a VAE: pixels in -1..1) to uint8 [B, 3, H, W], truncated as in ADM's evaluation.
    scale, shift: of vae.normalisation."""
    x = latents.float()
    if vae is not None:  # its activations are 100 times a sample
        x = torch.cat([vae.decode(some) for some in (x / scale + shift).split(16)])
    return (255 * (x + 1) / 2).clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)


def save_grid(images, columns, path):
    """Writes uint8 [N, 3, H, W] row by row as one PNG, N a multiple of columns."""
    rows = images.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).cpu().numpy()  # [rows, H, columns, W, 3]
    grid = rows.reshape(rows.shape[0] * rows.shape[1], -1, 3)
    write_atomically(path, lambda file: Image.fromarray(grid).save(file, "PNG"))


def save_preview(path, ema, settings, vae, device, grid, steps, seed, null, context_of, captions=None):
    """Grid of samples with one class or caption a row, always from the same noise. Captions are written beside it.
    ema, settings: a network's weights and its run's settings; grid: rows, columns; steps: of Euler; context_of: from
    classes or captions' numbers, 0..null - 1, to what the network takes."""
    model = make_network(settings["sit"]).to(device).eval()
    model.load_state_dict(ema)
    rows, columns = min(grid[0], null), grid[1]
    noise = settings["NOISE_SCALE"] * IndexedNoise(seed, range(rows * columns)).draw(model.state_shape)
    y = torch.linspace(0, null - 1, rows, dtype=torch.float64).round().long()
    if captions:
        save_lines(path.parent / "captions.txt", [captions[number] for number in y])
    of_context, images = velocity_of(model, settings, device), []
    velocity = lambda x, t, y: of_context(x, t, context_of(y))
    for row_noise, row_y in zip(noise.split(columns), y.repeat_interleave(columns).split(columns)):
        x = sample_ode(velocity, row_noise.to(device), row_y.to(device), steps=steps, null=null,
                       path=settings["PATH"])
        latents, _ = unpack(x, model.shape)
        images.append(to_bytes(latents, vae, *normalisation(settings["data"]["vae"], device)))
    save_grid(torch.cat(images), columns, path)


def velocity_of(model, settings, device, precision="bf16"):
    """The model's velocity as a function (x, t, context); its products in bf16 on a GPU, unless told "float32"."""
    def velocity(x, t, context):
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device) and precision == "bf16"):
            from_noise = settings.get("time_from_noise")
            return -model(x, 1 - t, context)[0] if from_noise else model(x, t, context)[0]
    return velocity


def check_settings():
    """Raises ValueError for settings that could only fail later."""
    check_constants(globals(), {
        "path": "RUN_DIR", "path or None": "CHECKPOINT VAE EMA TEXT_ENCODER OUT", "number above 0": "TOLERANCE",
        "whole number from 0": "NUM_SAMPLES SEED FRAMES", "whole number from 1": "STEPS BATCH_SIZE",
        "number from 0": "CFG_SCALE", "two numbers from 0 to 1": "GUIDANCE",
        "two whole numbers from 0 or None": "GRID", "list or None": "CLASSES", "list": "COMPARE",
        "True or False": "PNGS COMPILE"}, MODE=("sde", "ode"), SOLVER=("euler", "heun", "adaptive"),
        CLASS_SAMPLING=("uniform", "data", "balanced"), PRECISION=("bf16", "float32"))
    if GUIDANCE[0] > GUIDANCE[1]:
        raise ValueError(f"GUIDANCE {GUIDANCE}: the interval's lower end comes first")
    if SPACING != "log" and not (isinstance(SPACING, (int, float)) and SPACING > 0):
        raise ValueError(f'SPACING {SPACING!r} is neither "log" nor a number above 0')
    if FRAMES and MODE == "ode" and SOLVER == "adaptive":
        raise ValueError("FRAMES needs steps at the same times for all samples; set SOLVER to another than 'adaptive'")


def read_prompts():
    """PROMPTS as a list of texts; of a prepared folder, a list of the captions of each image."""
    if isinstance(PROMPTS, (str, Path)):
        if not Path(PROMPTS).is_dir():
            raise ValueError(f"PROMPTS {str(PROMPTS)!r}: no such folder; set it to a prepared "
                             f"folder with captions, or to a list of texts, as [{str(PROMPTS)!r}]")
        data = PreparedDataset(PROMPTS, with_images=False)
        if data.captions is None:
            raise ValueError(f"PROMPTS {str(PROMPTS)!r}: holds no captions; prepare images that have some")
        return [data.captions[first:last] for first, last in pairwise(data.caption_offsets)]
    are_texts = isinstance(PROMPTS, (list, tuple)) and all(isinstance(each, str) and each.strip() for each in PROMPTS)
    if not PROMPTS or not are_texts:
        raise ValueError(f"PROMPTS {PROMPTS!r}: this model draws from text; set it to a list of "
                         "texts, none of them empty, or to a prepared folder with captions")
    if any("\ud800" <= letter <= "\udfff" for each in PROMPTS for letter in each):
        raise ValueError(f"PROMPTS {PROMPTS!r}: has half a character (a lone surrogate), which no file can hold")
    return [" ".join(each.split()) for each in PROMPTS]


class Sampler:
    """A checkpoint ready to draw from: model, VAE, text encoder, and what CLASSES or PROMPTS choose, on the device."""

    def __init__(self, checkpoint, device):
        model, self.settings = load_model(checkpoint, EMA)
        arguments, self.encoder = self.settings["sit"], None
        self.null, self.shape, self.state_shape = getattr(model, "num_classes", None), model.shape, model.state_shape
        unused = "CLASSES" if "context_dim" in arguments else "PROMPTS"
        if globals()[unused] is not None:
            raise ValueError(f"{unused} {globals()[unused]!r}: not what this model draws from; set it to None")
        if "context_dim" in arguments:
            self.choices, name = read_prompts(), TEXT_ENCODER or self.settings["TEXT_ENCODER"]
            self.encoder = TextEncoder(name, self.settings["TEXT_LENGTH"])
            if self.encoder.dim != arguments["context_dim"]:
                raise ValueError(f"TEXT_ENCODER {name!r}: {self.encoder.dim} numbers a token, but {checkpoint} takes "
                                 f"{arguments['context_dim']}; set it to {self.settings['TEXT_ENCODER']!r}")
            self.encoder.to(device, torch.bfloat16 if has_bf16(device) and PRECISION == "bf16" else torch.float32)
        else:
            self.choices = list(range(self.null)) if CLASSES is None else list(CLASSES)
            if not self.choices or any(y not in range(self.null) for y in self.choices):
                raise ValueError(f"CLASSES {self.choices} must name at least one of the model's "
                                 f"classes 0..{self.null - 1}")
        self.drawn_from = self.choices
        if CLASS_SAMPLING == "data":
            counts = self.settings["data"].get("class_counts")
            if counts is None or self.encoder or not any(counts[y] for y in self.choices):
                raise ValueError(f"CLASS_SAMPLING 'data': {checkpoint} does not say how many images it saw of what it "
                                 f"draws; set it to 'uniform'")
            self.drawn_from = np.repeat(self.choices, [counts[y] for y in self.choices]).tolist()
        self.per_call = "bottleneck_dim" in arguments  # JiT's convention
        self.noise_scale = self.settings.get("NOISE_SCALE", 1.0)
        if MODE == "sde" and self.noise_scale != 1:
            raise ValueError(f"MODE 'sde' knows noise of scale 1 alone, and {checkpoint} has "
                             f"{self.noise_scale}; set it to 'ode'")
        scales = [value for value in (CFG_SCALE, *COMPARE) if not isinstance(value, (str, Path))]
        dropout = arguments.get("class_dropout_prob", self.settings.get("LABEL_DROPOUT"))
        if any(scale != 1 for scale in scales) and not dropout:
            raise ValueError(f"CFG_SCALE {CFG_SCALE} needs a model trained with LABEL_DROPOUT; set it to 1")
        vae_meta, self.vae = self.settings["data"]["vae"], None
        if vae_meta is not None:
            self.vae = load_decoder(VAE or vae_meta["name"], vae_meta, model.in_channels, checkpoint).to(device)
        to_pixels = normalisation(vae_meta, device)
        self.show = lambda x: to_bytes(unpack(x, model.shape)[0], self.vae, *to_pixels).cpu()  # without class tokens
        if COMPILE and device.type == "cuda":
            for part in (*model.blocks, model.final_layer):  # once for BATCH_SIZE, once for any other number
                part.compile(fullgraph=True)
        self.device, self.velocity = device, velocity_of(model.to(device), self.settings, device, PRECISION)

    def draw(self, indices, shown, cfg_scale=None, states=None):
        """uint8 images [B, 3, H, W] on the CPU: sample indices[i] of the class or prompt shown[i].
        To a list `states` is added what the network was given, step by step."""
        if self.encoder is None:
            y, null, context_of = torch.tensor(shown, device=self.device), self.null, lambda y: y
        else:
            y, context_of = torch.arange(len(shown), device=self.device), CaptionTable(self.encoder, shown)
            null = context_of.null

        def velocity(x, t, y):
            if states is not None:
                states.append(x[: len(shown)])
            return self.velocity(x, t, context_of(y))

        noise = IndexedNoise(SEED, indices)
        x = self.noise_scale * noise.draw(self.state_shape).to(self.device)
        options = dict(null=null, cfg_scale=CFG_SCALE if cfg_scale is None else cfg_scale, guidance=GUIDANCE)
        fixed = dict(options, steps=STEPS, path=self.settings["PATH"], spacing=SPACING)
        if MODE == "sde":
            x = sample_sde(velocity, x, y, randn_like=noise.randn_like, **fixed)
        elif SOLVER == "adaptive":
            x = sample_adaptive(velocity, x, y, tolerance=TOLERANCE, **options)
        else:
            x = sample_ode(velocity, x, y, heun=SOLVER == "heun", per_call=self.per_call, **fixed)
        return self.show(x)

    def draw_all(self, indices, shown, **options):
        """The same for any number of them."""
        batches = [slice(i, i + BATCH_SIZE) for i in range(0, len(indices), BATCH_SIZE)]
        return torch.cat([self.draw(indices[batch], shown[batch], **options) for batch in batches])


def class_of(index, choices):
    """The class or prompt of a sample: in turn, or drawn at random by (SEED, index). Of the lists
    of images' captions they come in turn, and from each list one at random."""
    random, of_images = np.random.default_rng((SEED, 5, index)), isinstance(choices[0], list)
    in_turn = CLASS_SAMPLING == "balanced" or of_images
    choice = choices[index % len(choices) if in_turn else random.integers(len(choices))]
    return choice[random.integers(len(choice))] if of_images else choice


def save_lines(path, lines):
    write_atomically(path, lambda file: file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8"))


def save_pictures(sampler, out):
    """The pictures that GRID, COMPARE and FRAMES ask for. Row r, column c of the grid has the noise
    of sample c K + r of K classes: of class-balanced samples it is that sample."""
    rows, columns = GRID or (0, 0)
    rows = min(rows or 10, len(sampler.choices))
    kind = "prompts" if sampler.encoder else "classes"
    shown = [class_of(r, sampler.choices) if isinstance(choice, list) else choice
             for r, choice in enumerate(sampler.choices[:rows])]
    if sampler.encoder:
        save_lines(out / "rows.txt", shown)
    if GRID and all(GRID):
        grid = [(c * len(sampler.choices) + r, shown[r]) for r in range(rows) for c in range(columns)]
        save_grid(sampler.draw_all(*zip(*grid)), columns, out / "samples.png")
        print(f"{out / 'samples.png'}: {rows} {kind} by {columns} samples")
    if COMPARE:
        drawn = []
        for value in COMPARE:
            checkpoint = isinstance(value, (str, Path))
            by = Sampler(value, sampler.device) if checkpoint else sampler
            drawn.append(by.draw_all(range(rows), shown, cfg_scale=CFG_SCALE if checkpoint else value))
        save_grid(torch.stack(drawn, dim=1).flatten(0, 1), len(COMPARE), out / "compare.png")
        print(f"{out / 'compare.png'}: {rows} {kind}, the same noise with {', '.join(map(str, COMPARE))}")
    if FRAMES:
        states = []
        final = sampler.draw(range(rows), shown, states=states)
        moments = np.linspace(0, len(states), FRAMES).round().astype(int)
        frames = [sampler.show(states[i]) if i < len(states) else final for i in moments]
        save_grid(torch.stack(frames, dim=1).flatten(0, 1), FRAMES, out / "path.png")
        print(f"{out / 'path.png'}: {rows} {kind}, {FRAMES} moments from noise to image")


def draw_samples(sampler, out, settings, checkpoint, rank, world):
    """samples.npz (arr_0 uint8 [N, H, W, 3], arr_1 the classes) or samples.npz and prompts.txt, by all processes, and
    the pictures. Images go into a memory-mapped file in OUT/unfinished, where `done` says which are there."""
    unfinished = out / "unfinished"
    wait_for_all = dist.barrier if world > 1 else lambda: None
    plan_file, images_file, done_file = (unfinished / name for name in ("plan.json", "images.npy", "done.npy"))
    if rank == 0:
        unfinished.mkdir(parents=True, exist_ok=True)
        lock_folder(unfinished, "OUT")
    wait_for_all()
    if plan_file.exists():
        refuse_other(unfinished, "was begun", json.loads(plan_file.read_text()), settings, "OUT")
    elif rank == 0:
        size = sampler.shape[-1] * (sampler.vae.factor if sampler.vae else 1)
        reserve(images_file, (NUM_SAMPLES, size, size, 3), np.uint8)
        reserve(done_file, (NUM_SAMPLES,), bool)
        write_atomically(plan_file, lambda path: path.write_text(json.dumps(settings, indent=1)))
    wait_for_all()
    images, done = np.load(images_file, mmap_mode="r+"), np.load(done_file, mmap_mode="r+")
    if shutil.disk_usage(out).free < images.nbytes:
        raise ValueError(f"{out}: no room for {images.nbytes:,} bytes of samples.npz beside what "
                         "is drawn; make room, or choose another OUT")
    missing = np.flatnonzero(~done)
    wait_for_all()  # all have seen the same before one goes on
    if rank == 0:  # while the others begin
        save_pictures(sampler, out)

    shown = [class_of(i, sampler.drawn_from) for i in range(NUM_SAMPLES)]
    batches = [missing[i : i + BATCH_SIZE] for i in range(0, len(missing), BATCH_SIZE)]
    drawn = NUM_SAMPLES - len(missing)
    with tqdm(total=NUM_SAMPLES, initial=drawn, unit="img", desc="sampling", disable=rank > 0) as bar:
        for batch in batches[rank::world]:
            images[batch] = sampler.draw(batch, [shown[i] for i in batch]).permute(0, 2, 3, 1).numpy()
            images.flush()
            done[batch] = True
            bar.update(int(done.sum()) - bar.n)  # of all processes
    wait_for_all()
    if rank:
        return
    write_samples(out, images, shown, captioned=bool(sampler.encoder))
    described = dict(settings, checkpoint=checkpoint, processes=world, torch=torch.__version__)
    write_atomically(out / "samples.json", lambda path: path.write_text(json.dumps(described, indent=1)))
    del images, done  # their files are in the folder that goes
    remove_folder(unfinished)


def write_samples(out, images, shown, captioned):
    def write(path):
        with open(path, "wb") as file:
            np.savez(file, arr_0=images, **({} if captioned else dict(arr_1=np.array(shown))))

    if captioned:
        save_lines(out / "prompts.txt", shown)
    write_atomically(out / "samples.npz", write)
    if PNGS:
        (out / "png").mkdir(exist_ok=True)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda i: Image.fromarray(images[i]).save(out / f"png/{i:06d}.png"), range(len(images))))
    print(f"{out / 'samples.npz'}: arr_0 {list(images.shape)} uint8, "
          + ("prompts.txt what they show" if captioned else f"classes {CLASS_SAMPLING}"))


@ends_in_one_line
def main():
    check_settings()
    rank, world, device = start_processes()
    torch.backends.cudnn.benchmark = True  # the VAE's fastest convolutions
    checkpoint, out = Path(CHECKPOINT or RUN_DIR), Path(OUT or Path(RUN_DIR, "samples"))
    checkpoint = checkpoint / "ema.safetensors" if checkpoint.is_dir() or not CHECKPOINT else checkpoint
    sampler = Sampler(checkpoint, device)

    # what shapes the samples: samples.json beside them, and what makes a run that goes on the same run
    names = ("VAE", "EMA", "TEXT_ENCODER", "NUM_SAMPLES", "CLASS_SAMPLING", "CLASSES", "PROMPTS", "SEED", "MODE",
             "SOLVER", "STEPS", "TOLERANCE", "SPACING", "CFG_SCALE", "GUIDANCE", "PRECISION")
    settings = dict(weights_sha256=weights_checksum(checkpoint), **{name: globals()[name] for name in names})
    settings = json.loads(json.dumps(settings, default=str))
    finished = NUM_SAMPLES and (out / "samples.json").exists()
    if finished:
        refuse_other(out, "has samples", json.loads((out / "samples.json").read_text()), settings, "OUT")
        if rank == 0:
            print(f"{out / 'samples.npz'}: already drawn")
    out.mkdir(parents=True, exist_ok=True)
    if NUM_SAMPLES and not finished:
        draw_samples(sampler, out, settings, str(checkpoint), rank, world)
    elif rank == 0:
        save_pictures(sampler, out)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
