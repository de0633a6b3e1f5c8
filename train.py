"""Trains a SiT with HASTE (arXiv 2505.16792): phase I aligns it with a frozen teacher, phase II is plain SiT training.

    python train.py                                  # one GPU, or a CPU
    torchrun --nproc_per_node=8 train.py             # eight GPUs
    train.STEPS = 1000; train.main()                 # an experiment: set constants in a Python file of yours

The constants below are the paper's ImageNet 256x256 run. The same command again resumes where the run stopped.
"""

import csv
import importlib.util
import json
import os
import platform
import reprlib
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

import sample
from model import MODELS, build
from prepare_latents import PreparedDataset, ignore_signals, load_vae, write_atomically
from teacher import Teacher, load_network

# data and run
DATA_DIR = "data/imagenet256"  # written by prepare_latents.py
RUN_DIR = "runs/haste-xl"  # everything that this run writes
WORKERS = 8  # processes per GPU that read batches; 0: none but this one
PREFETCH = 4  # batches that each of them reads ahead
MIRROR = False  # show each image mirrored with probability 0.5; for latents, set prepare_latents.MIRROR first
SEED = 0
# model
MODEL = "SiT-XL/2"  # see model.MODELS
PATH = "linear"  # interpolant: "linear" or "cosine"
LABEL_DROPOUT = 0.1  # probability of training on "no label", for classifier-free guidance
# phase I: alignment with the teacher
TEACHER = "vit_base_patch14_dinov2.lvd142m"  # timm name, or a .safetensors file written by teacher.py
LAYER_PAIRS = [(4, 8), (5, 9), (6, 10), (7, 11)]  # (student, teacher) layers, 0-based; B/2: (2, 7) (3, 9) (4, 11)
ALIGN_DEPTH = 8  # blocks before the tokens whose features are aligned; B/2: 5
FEATURE_WEIGHT = 0.5
ATTENTION_WEIGHT = 0.5  # 0: REPA
ALIGN_STEPS = 250_000  # length of phase I at most; 0: plain SiT; B/2: 100_000
TRIGGER = "steps"  # phase I ends at ALIGN_STEPS; or before, when the losses' gradients are in "conflict"
CONFLICT_FROM, CONFLICT_EVERY = 50_000, 10_000  # steps at which the gradients' cosine is measured and logged; 0: never
CONFLICT_IMAGES, CONFLICT_TIMES = 2048, (0.02, 0.1, 0.5, 0.8)  # on what
CONFLICT_BELOW = -0.05  # "conflict": phase II starts when their mean cosine falls below this
# optimisation
STEPS = 500_000  # 100 epochs of ImageNet
BATCH_SIZE = 256  # images per step over all GPUs
MICRO_BATCHES = 1  # gradient accumulation: parts in which each GPU computes its share of the batch
LEARNING_RATE = 1e-4  # constant
BETAS = (0.9, 0.999)
WEIGHT_DECAY = 0.0
GRAD_CLIP = 1.0  # largest gradient norm
EMA_DECAY = 0.9999
MAX_SKIPPED = 20  # steps in a row with a loss that is not finite, after which the run stops
# speed and memory
COMPILE = True
ACTIVATION_CHECKPOINTING = False  # recompute blocks in the backward pass: less memory, about 1/3 more compute
# reports
LOG_EVERY = 100  # steps; log.csv holds means over them
CHECKPOINT_EVERY = 50_000
PREVIEW_EVERY = 10_000  # grid of EMA samples; 0: none
PREVIEW_GRID, PREVIEW_STEPS = (8, 8), 50  # rows (classes) and columns; Euler steps
TRACKER = None  # "tensorboard" or "wandb", if that package is installed

# A run cannot be resumed with another value of these: they shape the weights, the data order or the noise.
FROZEN = ("SEED", "MIRROR", "MODEL", "PATH", "LABEL_DROPOUT", "BATCH_SIZE", "TEACHER", "LAYER_PAIRS", "ALIGN_DEPTH",
          "FEATURE_WEIGHT", "ATTENTION_WEIGHT")
COLUMNS = ("step", "phase", "denoising_loss", "feature_loss", "attention_loss", "grad_norm", "images_per_s",
           "gradient_cosine", "skipped")


# ---------------------------------------------------------------------------------------------------------------------
# losses


def interpolate(x, noise, t, path="linear"):
    """x_t = alpha(t) x + sigma(t) noise and its velocity d x_t / dt. x and noise [B, C, H, W], t [B] in 0..1."""
    alpha, sigma, d_alpha, d_sigma = sample.path_coefficients(t.view(-1, 1, 1, 1), path)
    return alpha * x + sigma * noise, d_alpha * x + d_sigma * noise


def attention_loss(student_logits, teacher_logits):
    """Cross-entropy of the student's attention rows against the teacher's: mean over rows, heads, batch, layer pairs.

    Lists of pre-softmax logits [B, heads, N, N], one per pair. Of unequal head counts the first min(Hs, Ht) are paired.
    HASTE, arXiv 2505.16792; computed in float32.
    """
    losses = []
    for s, p in zip(student_logits, teacher_logits, strict=True):
        if s.shape[0] != p.shape[0] or s.shape[2:] != p.shape[2:]:
            raise ValueError(f"student attention {list(s.shape)} and teacher attention {list(p.shape)} do not match; "
                             f"run the teacher at the student's grid times its patch size")
        heads = min(s.shape[1], p.shape[1])
        rows, targets = s[:, :heads].float(), p[:, :heads].float().softmax(dim=-1)  # [B, heads, N, N]
        losses.append(F.cross_entropy(rows.flatten(0, 2), targets.flatten(0, 2)))
    return torch.stack(losses).mean()


def feature_loss(student_tokens, teacher_tokens):
    """Minus the cosine similarity of tokens [B, N, D], mean over tokens and batch (REPA, arXiv 2410.06940)."""
    if student_tokens.shape != teacher_tokens.shape:
        raise ValueError(f"student features {list(student_tokens.shape)} and teacher tokens "
                         f"{list(teacher_tokens.shape)} do not match; run the teacher at the student's grid times its "
                         f"patch size")
    student, teacher = F.normalize(student_tokens.float(), dim=-1), F.normalize(teacher_tokens.float(), dim=-1)
    return -(student * teacher).sum(dim=-1).mean()


def compute_losses(student, teacher, x, noise, t, y, images):
    """(denoising, feature, attention) loss of a batch; without a teacher (phase II) the last two are zero."""
    x_t, target = interpolate(x, noise, t, PATH)
    if teacher is None:
        velocity, _, _ = student(x_t, t, y)
        feature = attention = torch.zeros((), device=x.device)
    else:
        teacher_tokens, teacher_logits = teacher(images)
        layers = tuple(s for s, _ in LAYER_PAIRS) if ATTENTION_WEIGHT else ()
        velocity, student_logits, features = student(x_t, t, y, layers, bool(FEATURE_WEIGHT))
        zero = torch.zeros((), device=x.device)
        feature = feature_loss(features, teacher_tokens) if FEATURE_WEIGHT else zero
        attention = attention_loss(student_logits, teacher_logits) if ATTENTION_WEIGHT else zero
    return F.mse_loss(velocity.float(), target), feature, attention


# ---------------------------------------------------------------------------------------------------------------------
# data order and noise: functions of (SEED, step), so that nothing need be replayed on resume


@lru_cache(maxsize=2)
def permutation(seed, epoch, count):
    """Order of the data set's images in an epoch, int64 [count]."""
    return np.random.default_rng((seed, 0, epoch)).permutation(count)


def batch_indices(step, count, rank, world):
    """This rank's part of the step's batch: numbers of images, plus `count` for a mirrored one (see PreparedDataset).

    Epochs follow each other without a gap.
    """
    part = slice(rank * BATCH_SIZE // world, (rank + 1) * BATCH_SIZE // world)
    positions = (np.arange(BATCH_SIZE) + step * BATCH_SIZE)[part]
    epochs = positions // count
    images = np.concatenate([permutation(SEED, int(epoch), count)[positions[epochs == epoch] % count]
                             for epoch in np.unique(epochs)])
    return images + count * (MIRROR & (np.random.default_rng((SEED, 1, step)).random(BATCH_SIZE) < 0.5)[part])


def open_batches(data, first, last, rank, world):
    """Iterator over this rank's (moments, labels, images or None) for the steps first..last - 1."""
    order = (batch_indices(step, len(data), rank, world) for step in range(first, last))
    workers = min(WORKERS, os.cpu_count())
    return iter(DataLoader(data, sampler=order, batch_size=None, num_workers=workers, worker_init_fn=ignore_signals,
                           prefetch_factor=PREFETCH if workers else None, pin_memory=torch.cuda.is_available()))


def draw_noise(step, shape, rank, world, device):
    """The step's random draws: posterior noise and noise [B, C, h, w], times and label-dropping draws [B] in 0..1.

    Drawn for the whole global batch, of which each rank takes its part: the number of GPUs changes nothing.
    """
    generator = torch.Generator(device).manual_seed(sample.seed_from(SEED, 1, step))
    part = slice(rank * BATCH_SIZE // world, (rank + 1) * BATCH_SIZE // world)
    normal = torch.randn(2, BATCH_SIZE, *shape, generator=generator, device=device)[:, part]
    uniform = torch.rand(2, BATCH_SIZE, generator=generator, device=device)[:, part]
    return *normal, *uniform


def sample_latents(moments, noise, vae_meta):
    """Scaled latents from stored (mean, std) [B, 2C, h, w]; without a VAE the stored pixels themselves."""
    if vae_meta is None:
        return moments.float()
    mean, std = moments.float().chunk(2, dim=1)
    return (mean + std * noise) * vae_meta["scale"]


# ---------------------------------------------------------------------------------------------------------------------
# state, settings and checkpoints


def make_optimizer(model):
    """AdamW over what trains. Fused: one kernel, and it can skip a step on the device (see the loop)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=BETAS, eps=1e-8, weight_decay=WEIGHT_DECAY, fused=True)


def ema_parameters(model):
    """The parameters that are averaged: all but the projector, which sampling does not need."""
    return {name: p for name, p in model.named_parameters() if not name.startswith("projectors.")}


def drop_projector(model, optimizer):
    """Phase II's model and optimiser: the projector is gone, every other parameter keeps its moments."""
    moments = optimizer.state
    model.projectors = None
    optimizer = make_optimizer(model)
    optimizer.state.update({p: moments[p] for p in optimizer.param_groups[0]["params"] if p in moments})
    return optimizer


def current_settings(data, sit):
    """Every constant of this file, the model's arguments and the data set: what makes the run repeatable."""
    not_settings = ("F", "MODELS", "FROZEN", "COLUMNS")
    constants = {name: value for name, value in globals().items() if name.isupper() and name not in not_settings}
    described = {key: data.meta[key] for key in ("source", "count", "image_size", "latent_shape", "vae", "classes")}
    versions = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)
    # through JSON and back, so that it compares equal to what was read from a file
    return json.loads(json.dumps(dict(constants, sit=sit, data=described, versions=versions), default=str))


def save_checkpoint(run, settings, step, aligning, cosine, model, ema, optimizer, meters):
    """Writes checkpoints/step_N.pt (everything needed to go on) and ema.safetensors (what sample.py needs)."""
    text = json.dumps(settings)
    state = dict(settings=text, step=step, aligning=aligning, cosine=cosine, model=model.state_dict(), ema=ema,
                 optimizer=optimizer.state_dict(), meters=meters)
    write_atomically(run / "checkpoints" / f"step_{step:07d}.pt", lambda path: torch.save(state, path))
    write_atomically(run / "ema.safetensors", lambda path: save_file(ema, path, metadata=dict(settings=text)))


def load_checkpoint(run, settings):
    """The newest checkpoint's state on the CPU, or None where the run is new.

    Raises ValueError if it is damaged or belongs to other settings.
    """
    found = sorted((run / "checkpoints").glob("step_*.pt"))
    if not found:
        return None
    try:
        state = torch.load(found[-1], map_location="cpu", weights_only=True, mmap=True)
        saved = json.loads(state["settings"])
    except Exception as error:  # zip, pickle and torch raise many kinds for a damaged file
        raise ValueError(f"{found[-1]}: damaged checkpoint ({type(error).__name__}); delete it to resume from the one "
                         f"before, if there is one") from error
    differing = [f"{key} {reprlib.repr(saved.get(key))}, now {reprlib.repr(settings[key])}" for key in FROZEN
                 if saved.get(key) != settings[key]]
    differing += [f"the data's {key} {reprlib.repr(value)}, now {reprlib.repr(settings['data'][key])}"
                  for key, value in saved["data"].items() if value != settings["data"][key]]
    if differing:
        raise ValueError(f"{found[-1]} was made with other settings ({'; '.join(differing)}); set them back, "
                         f"or choose another RUN_DIR")
    return state


def truncate_log(path, step):
    """Starts log.csv, or drops the rows after `step`, which a resumed run writes again, and one cut short by a kill."""
    rows = [line.split(",") for line in path.read_text().splitlines()[1:]] if path.exists() else []
    kept = [row for row in rows if len(row) == len(COLUMNS) and int(row[0]) <= step]
    text = "".join(",".join(row) + "\n" for row in (COLUMNS, *kept))
    write_atomically(path, lambda temporary: temporary.write_text(text))


def open_tracker(run, settings):
    """A function (step, values) that reports to TRACKER."""
    if TRACKER == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(run)
        return lambda step, values: [writer.add_scalar(key, value, step) for key, value in values.items()]
    if TRACKER == "wandb":
        import wandb
        wandb.init(project="nanohaste", name=run.name, id=run.name, dir=run, config=settings, resume="allow")
        return lambda step, values: wandb.log(values, step=step)
    return lambda step, values: None


def check_settings(data, world):
    """Raises ValueError for settings that could only fail later."""
    for name, value, choices in (("MODEL", MODEL, MODELS), ("PATH", PATH, ("linear", "cosine")),
                                 ("TRIGGER", TRIGGER, ("steps", "conflict")),
                                 ("TRACKER", TRACKER, (None, "tensorboard", "wandb"))):
        if value not in choices:
            raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(map(str, choices))}")
    if TRACKER and importlib.util.find_spec(TRACKER) is None:
        raise ValueError(f"TRACKER {TRACKER!r}: package not installed; pip install {TRACKER}, or set it to None")
    if BATCH_SIZE % (world * MICRO_BATCHES):
        raise ValueError(f"BATCH_SIZE {BATCH_SIZE} is no multiple of {world} processes times MICRO_BATCHES "
                         f"{MICRO_BATCHES}")
    if MIRROR and data.mirrored is None:
        raise ValueError(f"MIRROR: {DATA_DIR} holds no latents of mirrored images; prepare it again with "
                         f"prepare_latents.MIRROR = True, or set MIRROR to False")
    if TRIGGER == "conflict" and not CONFLICT_EVERY:
        raise ValueError("TRIGGER 'conflict' measures the gradients' cosine; set CONFLICT_EVERY to a number of steps")
    outside = [s for s, _ in LAYER_PAIRS if not 0 <= s < MODELS[MODEL]["depth"]]
    if ALIGN_STEPS and ATTENTION_WEIGHT and (outside or not LAYER_PAIRS):
        raise ValueError(f"LAYER_PAIRS {LAYER_PAIRS}: the student layers must lie in 0..{MODELS[MODEL]['depth'] - 1}; "
                         f"set ATTENTION_WEIGHT to 0 for none")


# ---------------------------------------------------------------------------------------------------------------------
# measurements beside the training step


def gradient_cosine(model, teacher, data, rank, world, device, autocast):
    """Mean cosine between the gradients of the denoising and of the alignment loss on block ALIGN_DEPTH.

    HASTE's measure of when the teacher starts to hinder: over the first CONFLICT_IMAGES images of an order of its own,
    at each time in CONFLICT_TIMES. Deterministic, the same for any number of GPUs.
    """
    block = list(model.blocks[ALIGN_DEPTH - 1].parameters())
    count = min(CONFLICT_IMAGES, len(data))
    chosen = np.array_split(permutation(SEED, 2**31, len(data))[:count], world)[rank]
    cosines = []
    for t in CONFLICT_TIMES:
        gradients = torch.zeros(2, sum(p.numel() for p in block), device=device)
        for part in np.array_split(chosen, -(-len(chosen) // max(1, BATCH_SIZE // world // MICRO_BATCHES))):
            moments, labels, images = (tensor.to(device) for tensor in data[part])
            noise = sample.IndexedNoise(sample.seed_from(SEED, 2), part).draw((2, *data.shape)).to(device)
            x = sample_latents(moments, noise[:, 0], data.vae)
            with autocast():
                denoising, feature, attention = compute_losses(
                    model, teacher, x, noise[:, 1], torch.full((len(part),), t, device=device), labels, images)
            alignment = FEATURE_WEIGHT * feature + ATTENTION_WEIGHT * attention
            for row, loss in enumerate((denoising, alignment)):
                gradients[row] += parameters_to_vector(torch.autograd.grad(
                    loss * len(part), block, retain_graph=row == 0, materialize_grads=True))
        if world > 1:
            dist.all_reduce(gradients)
        cosines.append(F.cosine_similarity(gradients[0], gradients[1], dim=0))
    return torch.stack(cosines).mean().item()


def save_preview(path, model, ema, vae, data, device, autocast):
    """Grid of EMA samples, always from the same noise so that previews can be compared: rows are classes."""
    rows, columns = min(PREVIEW_GRID[0], len(data.classes)), PREVIEW_GRID[1]
    noise = sample.IndexedNoise(SEED, range(rows * columns)).draw(data.shape)
    y = torch.linspace(0, len(data.classes) - 1, rows).round().long().repeat_interleave(columns)

    def velocity(x, t, y):
        with autocast():
            return functional_call(model, ema, (x, t, y))[0]

    images = []
    for row_noise, row_y in zip(noise.split(columns), y.split(columns)):
        latents = sample.sample_ode(velocity, row_noise.to(device), row_y.to(device), steps=PREVIEW_STEPS,
                                    null=model.num_classes, path=PATH)
        images.append(sample.to_bytes(latents, vae, data.vae and data.vae["scale"]))
    sample.save_grid(torch.cat(images), columns, path)


# ---------------------------------------------------------------------------------------------------------------------


def main():
    # processes and device
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    use_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=use_bf16)

    # data: phase II never opens the images
    data = PreparedDataset(DATA_DIR, with_images=False)
    check_settings(data, world)

    # teacher, if this run starts with phase I: at the student's grid, whatever the size of the images
    aligned = ALIGN_STEPS > 0 and (FEATURE_WEIGHT > 0 or ATTENTION_WEIGHT > 0)
    sit = dict(MODELS[MODEL], in_channels=data.shape[0], input_size=data.shape[1], num_classes=len(data.classes),
               class_dropout_prob=LABEL_DROPOUT, align_depth=ALIGN_DEPTH, teacher_dim=None)
    settings = current_settings(data, sit)
    run = Path(RUN_DIR)
    state = load_checkpoint(run, settings)
    step = state["step"] if state else 0
    aligning = state["aligning"] if state else aligned  # phase I; once False it stays False
    cosine = state["cosine"] if state else None  # of the gradients, when last measured
    teacher = None
    if aligning and step < ALIGN_STEPS:
        data = PreparedDataset(DATA_DIR)
        network = load_network(TEACHER)
        patch = network.patch_embed.patch_size[0] if hasattr(network, "patch_embed") else 1
        teacher_layers = [layer for _, layer in LAYER_PAIRS] if ATTENTION_WEIGHT else []
        teacher = Teacher(network, teacher_layers, input_size=data.shape[1] // sit["patch_size"] * patch).to(device)
    vae = load_vae(data.vae["name"])[0].to(device) if PREVIEW_EVERY and data.vae and rank == 0 else None

    # model, optimiser, EMA
    torch.manual_seed(sample.seed_from(SEED, 3))
    teacher_dim = None
    if aligning and FEATURE_WEIGHT:
        teacher_dim = state["model"]["projectors.0.4.bias"].shape[0] if state else teacher.dim
    model = build(MODEL, **{**sit, "teacher_dim": teacher_dim}).to(device)
    model.activation_checkpointing = ACTIVATION_CHECKPOINTING
    optimizer = make_optimizer(model)
    ema = {name: p.detach().clone() for name, p in ema_parameters(model).items()}
    update_ema = get_ema_multi_avg_fn(EMA_DECAY)
    meters = torch.zeros(8, dtype=torch.float64, device=device)  # sums since the last log: see the loop
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for group in optimizer.param_groups:  # the constants of now, not those of the checkpoint
            group.update(lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)
        for name, value in state["ema"].items():
            ema[name].copy_(value)
        meters.copy_(state["meters"])
        state = None

    def prepare_step(model):
        """What the loop calls: the model, replicated and compiled. Called at the start and once at the switch."""
        student = DistributedDataParallel(model) if world > 1 else model
        return torch.compile(student) if COMPILE else student

    student = prepare_step(model)
    if teacher is not None and COMPILE:
        teacher = torch.compile(teacher)

    # run folder: what is needed to repeat the run
    if rank == 0:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "previews").mkdir(exist_ok=True)
        for unfinished in run.rglob("*.tmp*"):  # what a killed run was writing
            unfinished.unlink()
        write_atomically(run / "settings.json", lambda path: path.write_text(json.dumps(settings, indent=1)))
        write_atomically(run / "train.py", lambda path: shutil.copyfile(__file__, path))
        truncate_log(run / "log.csv", step)
    track = open_tracker(run, settings) if rank == 0 else None

    def log(text):
        if rank == 0:
            tqdm.write(text)
            with open(run / "log.txt", "a") as file:
                file.write(text + "\n")

    # Ctrl-C or SIGTERM: finish the step, save, leave. A second one kills.
    stop_signals = []

    def request_stop(number, _):
        stop_signals.append(number)
        signal.signal(number, signal.SIG_DFL)

    handlers = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    stop_group = dist.new_group(backend="gloo") if world > 1 else None  # on the host: no wait for the GPU

    def stop_requested(step):
        """Ranks must leave at the same step, so with several they agree, every tenth step."""
        if world == 1:
            return bool(stop_signals)
        if step % 10:
            return False
        requested = torch.tensor(len(stop_signals))
        dist.all_reduce(requested, group=stop_group)
        return requested.item() > 0

    micro = BATCH_SIZE // world // MICRO_BATCHES
    parameters = sum(p.numel() for p in model.parameters())
    log(f"{MODEL}, {parameters:,} parameters, {len(data):,} images, {world} x {device.type}, "
        f"{'bf16' if use_bf16 else 'float32'}, phase {'I' if aligning else 'II'} from step {step:,}")
    batches = open_batches(data, step, ALIGN_STEPS if aligning else STEPS, rank, world) if step < STEPS else None
    bar = tqdm(total=STEPS, initial=step, unit="step", disable=rank > 0)
    logged_step, clock = step, time.perf_counter()

    while step < STEPS:
        # the switch: teacher, projector and images go for good
        conflict = TRIGGER == "conflict" and cosine is not None and cosine < CONFLICT_BELOW
        if aligning and (step >= ALIGN_STEPS or conflict):
            aligning, teacher = False, None
            optimizer = drop_projector(model, optimizer)
            torch.compiler.reset()
            student = prepare_step(model)
            data = PreparedDataset(DATA_DIR, with_images=False)
            batches = open_batches(data, step, STEPS, rank, world)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            log(f"step {step:,}: phase II, plain SiT; teacher and projector are gone")

        # ----- the training step ---------------------------------------------------------------------------------
        moments, labels, images = next(batches)
        moments, labels = moments.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        images = images.to(device, non_blocking=True) if aligning else None  # uint8 [B, 3, H, W]
        posterior_noise, noise, t, drop = draw_noise(step, data.shape, rank, world, device)
        x = sample_latents(moments, posterior_noise, data.vae)  # [B, C, h, w]
        y = torch.where(drop < LABEL_DROPOUT, model.num_classes, labels)

        step_losses = torch.zeros(3, device=device)  # denoising, feature, attention
        for i in range(MICRO_BATCHES):
            part = slice(i * micro, (i + 1) * micro)
            last = i + 1 == MICRO_BATCHES
            with nullcontext() if last or world == 1 else student.no_sync():  # ranks exchange gradients once a step
                with autocast():
                    losses = compute_losses(student, teacher, x[part], noise[part], t[part], y[part],
                                            images[part] if aligning else None)
                denoising, feature, attention = losses
                loss = denoising + FEATURE_WEIGHT * feature + ATTENTION_WEIGHT * attention
                (loss / MICRO_BATCHES).backward()
            step_losses += torch.stack(losses).detach() / MICRO_BATCHES

        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        bad = (~torch.isfinite(step_losses.sum() + grad_norm)).float()
        if world > 1:
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        optimizer.found_inf = bad  # 1: the fused step changes nothing, decided on the device
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(list(ema.values()), list(ema_parameters(model).values()), None)

        # meters: sums of 3 losses and the gradient norm over good steps, their count; skipped: in a row, most, in all
        good_values = torch.where(bad > 0, 0, torch.cat([step_losses, grad_norm[None], torch.ones_like(bad)[None]]))
        meters[:5] += good_values
        meters[5] = (meters[5] + bad) * bad
        meters[6] = torch.maximum(meters[5], meters[6])
        meters[7] += bad
        step += 1
        # ---------------------------------------------------------------------------------------------------------

        bar.update()
        if CONFLICT_EVERY and aligning and step >= CONFLICT_FROM and step % CONFLICT_EVERY == 0:
            paused = time.perf_counter()
            cosine = gradient_cosine(model, teacher, data, rank, world, device, autocast)
            log(f"step {step:,}: gradient cosine {cosine:+.3f} between denoising and alignment loss")
            clock += time.perf_counter() - paused

        if step % LOG_EVERY == 0 or step == STEPS or (aligning and step == ALIGN_STEPS):
            if world > 1:
                dist.all_reduce(meters[:3], op=dist.ReduceOp.SUM)
                meters[:3] /= world
            *sums, good, _, in_a_row, skipped = meters.tolist()  # the only wait for the device
            now = time.perf_counter()
            denoising, feature, attention, norm = (value / good if good else float("nan") for value in sums)
            row = dict(step=step, phase=1 if aligning else 2, denoising_loss=denoising, feature_loss=feature,
                       attention_loss=attention, grad_norm=norm,
                       images_per_s=(step - logged_step) * BATCH_SIZE / (now - clock),
                       gradient_cosine=cosine, skipped=int(skipped))
            meters[:5], meters[6] = 0, meters[5]
            logged_step, clock = step, now
            if rank == 0:
                with open(run / "log.csv", "a", newline="") as file:
                    csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
                track(step, {key: value for key, value in row.items() if value is not None})
                bar.set_postfix_str(f"loss {denoising:.3f} feat {feature:+.3f} attn {attention:.3f} norm {norm:.2f} "
                                    f"{row['images_per_s']:.0f} img/s")
            if in_a_row >= MAX_SKIPPED:
                raise FloatingPointError(f"step {step}: the loss was not finite in {int(in_a_row)} steps in a row; the "
                                         f"last checkpoint is untouched: lower LEARNING_RATE or look at {DATA_DIR}")

        stopping = stop_requested(step)
        paused = time.perf_counter()
        if rank == 0 and PREVIEW_EVERY and (step % PREVIEW_EVERY == 0 or step == STEPS):
            save_preview(run / "previews" / f"step_{step:07d}.png", model, ema, vae, data, device, autocast)
        if rank == 0 and (step % CHECKPOINT_EVERY == 0 or step == STEPS or stopping):
            save_checkpoint(run, settings, step, aligning, cosine, model, ema, optimizer, meters)
        clock += time.perf_counter() - paused
        if stopping:
            log(f"step {step:,}: stopped by a signal and saved; the same command resumes")
            break

    bar.close()
    if step == STEPS:
        log(f"step {step:,}: done; raise STEPS to train on, or draw samples with sample.py")
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError) as error:  # bad input: its one line says what, where and the remedy
        sys.exit(f"train.py: {error}")
