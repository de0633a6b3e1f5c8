"""Trains a SiT, an MMDiT on captions or a JiT on pixels with HASTE (arXiv 2505.16792): phase I
aligns it with a frozen teacher, phase II is plain training.

    python train.py                                  # one GPU, or a CPU
    torchrun --nproc_per_node=8 train.py             # eight GPUs
    train.STEPS = 1000; train.main()                 # an experiment, in a Python file of yours

The constants below are the paper's ImageNet 256x256 run. The same command again resumes.
"""

import gc
import math
import os
import signal
import sys
import time
from functools import lru_cache, partial
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the rest is imported

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

import checkpoint
import costs
from checkpoint import local
from checks import check_constants, check_layers, check_times, is_installed, too_short_for_ema
from class_tokens import ClassTokens, clean_state
from dataset import PreparedDataset, open_loader
from init_from import initial_weights
from losses import attention_loss_of_qk, feature_loss, normalize_over_tokens, sums_by_time
from model import MODELS, interpolate, make_network, unpack
from runtime import collect_stops, ends_in_one_line, exit_status, has_bf16, run_script, start_processes
from sample import save_preview, seed_from
from teacher import teacher_for_grid
from text import CaptionTable, TextEncoder
from vae import load_vae

# data and run
DATA_DIR = "data/imagenet256"  # written by prepare_latents.py
RUN_DIR = "runs/haste-xl"  # everything that this run writes; of several nodes, on a disk that all see
WORKERS = 8  # processes per GPU that read batches; 0: none but this one
MIRROR = False  # show each image mirrored with probability 0.5; latents want prepare_latents.MIRROR
SEED = 0
INIT_FROM = None  # weights to start from, ours or published: what sample.CHECKPOINT takes
# model
MODEL = "SiT-XL/2"  # see model.MODELS; an MMDiT learns from captions, a JiT predicts pixels
PATH = "linear"  # interpolant: "linear" or "cosine"
LABEL_DROPOUT = 0.1  # probability of "no label", or the empty caption, for classifier-free guidance
CLASS_WEIGHT = 0.0  # REG's, 0.03: beside latents a SiT denoises TEACHER's class token, in both phases; 0: not
TIMES = "uniform"  # or (mean, std) of a logit-normal: (0.0, 1.0), SD3's, favours the middle
TIME_SHIFT = 1.0  # s: times t become s t / (1 + (s - 1) t); above 1 nearer to noise
NOISE_SCALE = 1.0  # standard deviation of the noise; 2.0: JiT's at 512 pixels
# captions
TEXT_ENCODER = "openai/clip-vit-large-patch14"  # of transformers: hub name or folder
TEXT_LENGTH = 77  # tokens of a caption; longer ones are cut, shorter ones padded
TEXT_TABLE_GIB = 4  # up to so many, all captions are encoded once; beyond, those of each batch
# phase I: alignment with the teacher
TEACHER = "vit_base_patch14_dinov2.lvd142m"  # timm name, or a file of experiments/train_network.py
LAYER_PAIRS = [(4, 8), (5, 9), (6, 10), (7, 11)]  # (student, teacher), 0-based; B/2: (2, 7) (3, 9) (4, 11)
ALIGN_DEPTH = 8  # blocks before the tokens whose features are aligned; B/2: 5
FEATURE_WEIGHT = 0.5
ATTENTION_WEIGHT = 0.5  # 0: REPA
PROJECTOR = "mlp"  # from the student's tokens to the teacher's, as REPA; "conv": 3 x 3, as iREPA
SPATIAL_NORM = 0.0  # iREPA's gamma, 0.6: which part of their mean the teacher's tokens lose
ALIGN_STEPS = 250_000  # length of phase I at most; 0: plain SiT; B/2: 100_000
TRIGGER = "step"  # phase I ends at ALIGN_STEPS; or before, when the gradients are in "conflict"
CONFLICT_FROM, CONFLICT_EVERY = 50_000, 10_000  # steps at which their cosine is measured; 0: never
CONFLICT_IMAGES, CONFLICT_TIMES = 2048, (0.02, 0.1, 0.5, 0.8)  # on what; in whole batches
CONFLICT_BELOW = -0.05  # a mean below ends phase I: the paper's SiT-B/2 example (XL/2's, by its table, is never so low)
# optimisation
STEPS = 500_000  # 100 epochs of ImageNet
BATCH_SIZE = 256  # images per step over all GPUs
MICRO_BATCHES = 1  # gradient accumulation: parts in which each GPU computes its share of the batch
LEARNING_RATE, WARMUP_STEPS = 1e-4, 0  # constant, after steps in which it rises in a line
BETAS = (0.9, 0.999)
WEIGHT_DECAY = 0.0
GRAD_CLIP = 1.0  # largest gradient norm
EMA_DECAY = 0.9999
MAX_SKIPPED = 20  # steps in a row with a loss that is not finite, after which the run stops
# speed and memory
COMPILE = True
SHARDING = "zero2"  # of weights: gathered once a step; "zero3": again for backward; "replicate": never split
REDUCE_PRECISION = "float32"  # of gradients between GPUs; "bf16": half the traffic, rounded sums
RESIDUAL_PRECISION = "float32"  # of the tokens that blocks add to; "bf16": less to move
ACTIVATION_CHECKPOINTING = False  # recompute blocks in the backward pass: less memory, 1/3 more work
# reports
LOG_EVERY = 100  # steps; log.csv holds means over them
CHECKPOINT_EVERY = 10_000
CHECKPOINTS_KEPT = 3  # the last ones
KEEP_EVERY = 50_000  # steps of which a checkpoint is kept forever; 0: none
PREVIEW_EVERY = 10_000  # grid of EMA samples; 0: none
PREVIEW_GRID, PREVIEW_STEPS = (8, 8), 50  # rows (classes) and columns; Euler steps
TRACKER = None  # "tensorboard" or "wandb", if that package is installed

# A run cannot be resumed with another value of these: they shape weights, data order or noise.
FROZEN = ("SEED", "MIRROR", "MODEL", "PATH", "LABEL_DROPOUT", "CLASS_WEIGHT", "TIMES", "TIME_SHIFT", "NOISE_SCALE",
          "TEXT_ENCODER", "TEXT_LENGTH", "BATCH_SIZE", "TEACHER", "LAYER_PAIRS", "ALIGN_DEPTH",
          "FEATURE_WEIGHT", "ATTENTION_WEIGHT", "PROJECTOR", "SPATIAL_NORM")
LOGS = {
    "log.csv": ("step", "phase", "denoising_loss", "feature_loss", "attention_loss", "grad_norm", "gradient_cosine",
                "skipped", "images_per_s", "step_ms", "mfu", "peak_gib"),
    "loss_by_time.csv": ("step", *(f"t {i / 10} to {(i + 1) / 10}" for i in range(10)))}  # denoising


# ----- losses of a batch --------------------------------------------------------------------------
def alignment_losses(features, student_qk, teacher_tokens, teacher_qk, cls=None):
    """(feature, attention) loss; zero where the student hands out nothing to align. cls: REG's class tokens [B, E]."""
    feature = attention = torch.zeros((), device=teacher_tokens.device)
    if SPATIAL_NORM:
        teacher_tokens = normalize_over_tokens(teacher_tokens, SPATIAL_NORM)
    if features is not None:
        if CLASS_WEIGHT:  # in front, as the student's is; a convolution's features have none
            teacher_tokens = torch.cat([cls[:, None], teacher_tokens], dim=1)[:, -features.shape[1] :]
        feature = feature_loss(features, teacher_tokens)
    if student_qk:
        attention = attention_loss_of_qk(student_qk, teacher_qk)
    return feature, attention


def compute_losses(student, teacher, x, noise, t, context, images, align=alignment_losses):
    """(denoising, feature, attention) loss of a batch, the last two 0 without a teacher, as in phase II; each image's
    denoising loss [B], which trains nothing; with CLASS_WEIGHT the class token's loss too.
    context: what the student takes beside x_t and t, class ids [B] or embedded captions [B, L, C]."""
    x_t, target = interpolate(x, noise, t, PATH)
    if teacher is None:
        velocity, _, _ = student(x_t, t, context)
        feature = attention = torch.zeros((), device=x.device)
    else:
        teacher_tokens, teacher_qk = teacher(images, return_qk=True)
        layers = tuple(s for s, _ in LAYER_PAIRS) if ATTENTION_WEIGHT else ()
        velocity, student_qk, features = student(x_t, t, context, layers, bool(FEATURE_WEIGHT), return_qk=True)
        feature, attention = align(features, student_qk, teacher_tokens, teacher_qk, unpack(x, student.shape)[1])
    (velocity, class_velocity), (target, class_target) = (unpack(v.float(), student.shape) for v in (velocity, target))
    each = (velocity.detach() - target).square().mean(dim=(1, 2, 3))
    losses = F.mse_loss(velocity, target), feature, attention, each
    return (*losses, F.mse_loss(class_velocity, class_target)) if CLASS_WEIGHT else losses


# ----- data order and noise: functions of (SEED, step), so that nothing need be replayed ----------
@lru_cache(maxsize=2)
def permutation(seed, epoch, count):
    """Order of the data set's images in an epoch, int64 [count]."""
    return np.random.default_rng((seed, 0, epoch)).permutation(count)


def part_of(rank, world):
    """This rank's part of the global batch."""
    return slice(rank * BATCH_SIZE // world, (rank + 1) * BATCH_SIZE // world)


def batch_indices(step, count, rank, world):
    """This rank's part of the step's batch: numbers of images, plus `count` for a mirrored one (see
    PreparedDataset). Epochs follow each other without a gap."""
    part = part_of(rank, world)
    positions = (np.arange(BATCH_SIZE) + step * BATCH_SIZE)[part]
    epochs = positions // count
    images = np.concatenate([permutation(SEED, int(each), count)[positions[epochs == each] % count]
                             for each in np.unique(epochs)])
    mirrored = np.random.default_rng((SEED, 1, step)).random(BATCH_SIZE) < 0.5
    return images + count * (MIRROR & mirrored[part])


def open_batches(data, steps, rank, world, device):
    """Iterator over this rank's (moments, labels, images or None, with CLASS_WEIGHT class tokens) of a range of steps,
    on the device. Labels are class ids, or for a model that takes text the numbers of captions."""
    def chosen(step):
        images = batch_indices(step, len(data), rank, world)
        draws = np.random.default_rng((SEED, 6, step)).random(BATCH_SIZE)[part_of(rank, world)]  # of its captions
        return (images, draws) if "context_dim" in MODELS[MODEL] else images

    loader = open_loader(data, map(chosen, steps), WORKERS, device)  # whose processes begin at once
    return ([part if part is None else part.to(device, non_blocking=True) for part in batch] for batch in loader)


def drawn_whole(shape, of_pixels):
    """Whether each rank draws the noise of the whole global batch: of latents, and of pixels where it is small."""
    return not of_pixels or 2 * BATCH_SIZE * math.prod(shape) <= 2**24


def draw_noise(step, shape, rank, world, device, stream=1, of_pixels=False):
    """The step's draws: posterior noise (None of large pixels) and noise [B, *shape], times and label-dropping draws,
    both [B] in 0..1. Each rank takes its part of the whole batch's, or draws its blocks of 16 images, each with a seed
    of its own: the number of GPUs changes nothing. (Their model may.)"""
    part, seed = part_of(rank, world), (SEED, stream, step)
    generator = torch.Generator(device).manual_seed(seed_from(*seed))
    options = dict(generator=generator, device=device)
    if drawn_whole(shape, of_pixels):
        posterior_noise, noise = torch.randn(2, BATCH_SIZE, *shape, **options)[:, part]
        return posterior_noise, NOISE_SCALE * noise, *torch.rand(2, BATCH_SIZE, **options)[:, part]
    uniform = torch.rand(2, BATCH_SIZE, **options)[:, part]
    blocks, first = [], part.start // 16
    for block in range(first, math.ceil(part.stop / 16)):
        generator.manual_seed(seed_from(*seed, block))
        blocks.append(torch.randn(16, *shape, **options))
    return None, NOISE_SCALE * torch.cat(blocks)[part.start - 16 * first : part.stop - 16 * first], *uniform


def spread_times(u):
    """Times t [B] in 0..1 of uniform draws u, as TIMES and TIME_SHIFT say (SD3, arXiv 2403.03206)."""
    t = u
    if TIMES != "uniform":
        mean, std = TIMES
        normal = 2**0.5 * torch.erfinv(2 * u.double() - 1)  # quantiles, in float64 for those far out
        t = torch.sigmoid(mean + std * normal).float()
    return t if TIME_SHIFT == 1 else TIME_SHIFT * t / (1 + (TIME_SHIFT - 1) * t)


# ----- model over GPUs, optimiser, EMA ------------------------------------------------------------
def shard(model, device, world, shards, dtype):
    """Spreads the model over all processes (FSDP2): float32 weights, gathered in `dtype` four blocks at a time, as
    single ones cost the CPU too much. Each group of `shards` neighbouring ranks holds all; this rank's is returned."""
    mesh = dist.init_device_mesh(device.type, (world // shards, shards), mesh_dim_names=("replicate", "shard"))
    options = dict(mesh=mesh if world > shards else mesh["shard"], reshard_after_forward=SHARDING == "zero3")
    # Under autocast the residual stream and what lies outside the blocks stay float32.
    reduced = torch.float32 if REDUCE_PRECISION == "float32" else torch.bfloat16
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduced, cast_forward_inputs=False)
    fours = [list(model.blocks[i : i + 4]) for i in range(0, len(model.blocks), 4)]
    for part in (*fours, *(model.projectors or ())):
        fully_shard(part, mp_policy=policy, **options)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **options)
    return mesh["shard"].get_group() if world > 1 else None


@torch.no_grad()
def make_optimizer(model):
    """AdamW over this rank's shards of what trains, in its order: of DTensors a step would cost the
    CPU far more. Fused: one kernel, and it can skip a step on the device (see the loop)."""
    shards = [local(p) for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(shards, LEARNING_RATE, BETAS, eps=1e-8, weight_decay=WEIGHT_DECAY, fused=True)
    for p in shards:  # its state from the start, so that a checkpoint can be read into it
        moments = dict(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        optimizer.state[p] = dict(step=torch.zeros((), device=p.device), **moments)
    return optimizer


def clip_gradients(shards, group):
    """Scales the gradients that the ranks of `group` hold to a norm of GRAD_CLIP at most; returns the norm before."""
    gradients = [p.grad for p in shards if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))  # of this rank's shards
    if group is not None:
        norms = norms.square()
        dist.all_reduce(norms, group=group)
        norms = norms.sqrt()
    norm = torch.linalg.vector_norm(norms)
    torch._foreach_mul_(gradients, (GRAD_CLIP / (norm + 1e-6)).clamp(max=1))
    return norm


# ----- settings, and a measurement beside the training step ---------------------------------------
def check_settings(world):
    """Raises ValueError for settings that could only fail later."""
    check_constants(globals(), {
        "path": "DATA_DIR RUN_DIR TEACHER TEXT_ENCODER", "path or None": "INIT_FROM",
        "True or False": "MIRROR COMPILE ACTIVATION_CHECKPOINTING",
        "whole number from 0": "WORKERS SEED ALIGN_STEPS CONFLICT_FROM CONFLICT_EVERY STEPS WARMUP_STEPS LOG_EVERY "
                               "CHECKPOINT_EVERY CHECKPOINTS_KEPT KEEP_EVERY PREVIEW_EVERY",
        "whole number from 1": "TEXT_LENGTH ALIGN_DEPTH CONFLICT_IMAGES BATCH_SIZE MICRO_BATCHES MAX_SKIPPED "
                               "PREVIEW_STEPS",
        "number from 0": "CLASS_WEIGHT TEXT_TABLE_GIB FEATURE_WEIGHT ATTENTION_WEIGHT SPATIAL_NORM LEARNING_RATE "
                         "WEIGHT_DECAY", "number above 0": "GRAD_CLIP TIME_SHIFT NOISE_SCALE",
        "number from -1 to 1": "CONFLICT_BELOW", "number from 0 to 1": "LABEL_DROPOUT",
        "number from 0 to 0.9999999": "EMA_DECAY", "list": "LAYER_PAIRS", "numbers from 0 to 1": "CONFLICT_TIMES",
        "two whole numbers from 1": "PREVIEW_GRID", "two numbers from 0 to 0.9999999": "BETAS"},
        MODEL=MODELS, PATH=("linear", "cosine"), PROJECTOR=("mlp", "conv"), TRIGGER=("step", "conflict"),
        SHARDING=("zero2", "zero3", "replicate"), REDUCE_PRECISION=("float32", "bf16"),
        RESIDUAL_PRECISION=("float32", "bf16"), TRACKER=(None, "tensorboard", "wandb"))

    arguments, parts = MODELS[MODEL], world * MICRO_BATCHES
    if TRACKER and not is_installed(TRACKER):
        raise ValueError(f"TRACKER {TRACKER!r}: package not installed; pip install {TRACKER}, or set it to None")
    if BATCH_SIZE % parts:
        raise ValueError(f"BATCH_SIZE {BATCH_SIZE} does not divide among {world} processes times {MICRO_BATCHES} "
                         f"MICRO_BATCHES; the nearest that does is {max(1, round(BATCH_SIZE / parts)) * parts}")
    check_times(TIMES)
    if "bottleneck_dim" in arguments and (TIMES == "uniform" or PATH != "linear"):
        raise ValueError(f"MODEL {MODEL!r} predicts images, of which times near 0 make no velocity; set PATH to "
                         f"'linear', and TIMES to JiT's (0.8, 0.8) or another logit-normal")
    if CLASS_WEIGHT and {"context_dim", "bottleneck_dim"} & arguments.keys():
        raise ValueError(f"CLASS_WEIGHT {CLASS_WEIGHT}: a SiT alone denoises a class token, not {MODEL!r}; set it to 0")
    if TRIGGER == "conflict" and not CONFLICT_EVERY:
        raise ValueError("TRIGGER 'conflict' measures the gradients' cosine; set CONFLICT_EVERY to a number of steps")
    if ALIGN_STEPS:
        check_layers(MODEL, arguments["depth"], ALIGN_DEPTH, LAYER_PAIRS if ATTENTION_WEIGHT else None)


def gradient_cosine(model, teacher, align, data, context_of, rank, world, device, autocast):
    """Mean cosine between the gradients of the denoising and of the alignment loss on block ALIGN_DEPTH.

    HASTE's measure of when the teacher starts to hinder: on the run's first CONFLICT_IMAGES images, in whole batches,
    at each time in CONFLICT_TIMES. The same on all ranks."""
    block = list(model.blocks[ALIGN_DEPTH - 1].parameters())
    steps = range(max(1, CONFLICT_IMAGES // BATCH_SIZE))
    batches = list(open_batches(data, steps, rank, world, device))
    micro = BATCH_SIZE // world // MICRO_BATCHES

    def gradient(time, teacher):
        for step, (moments, labels, images, *cls) in zip(steps, batches):
            posterior_noise, noise, _, _ = draw_noise(step, model.state_shape, rank, world, device, 2, data.vae is None)
            x = clean_state(data, moments, posterior_noise, *cls)
            t = torch.full_like(x[:, 0, 0, 0], time)
            for i in range(MICRO_BATCHES):
                part = slice(i * micro, (i + 1) * micro)
                context = context_of(labels[part])
                with autocast():
                    denoising, feature, attention, _, *of_class = compute_losses(
                        model, teacher, x[part], noise[part], t[part], context, images[part], align)
                if CLASS_WEIGHT:  # is denoising too
                    denoising = denoising + CLASS_WEIGHT * of_class[0]
                alignment = FEATURE_WEIGHT * feature + ATTENTION_WEIGHT * attention
                (denoising if teacher is None else alignment).backward()
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in block]
        model.zero_grad(set_to_none=True)
        return torch.cat([checkpoint.whole(each).flatten() for each in found])

    if dist.is_initialized():  # the alignment losses do not reach the end of their four blocks
        model.set_reshard_after_forward(False)
    mean = torch.stack([F.cosine_similarity(gradient(t, None), gradient(t, teacher), dim=0)
                        for t in CONFLICT_TIMES]).mean()
    if dist.is_initialized():
        model.set_reshard_after_forward(SHARDING == "zero3")
        dist.broadcast(mean, 0)
    return mean.item()


# ----- the run ------------------------------------------------------------------------------------
def network_arguments(data):
    """What the network is built with, by MODEL and the data. Raises ValueError where the two do not fit."""
    if MIRROR and data.vae is not None and data.mirrored is None:
        raise ValueError(f"MIRROR: {DATA_DIR} holds no latents of mirrored images; prepare it again with "
                         f"prepare_latents.MIRROR = True, or set MIRROR to False")
    network = dict(MODELS[MODEL], in_channels=data.shape[0], input_size=data.shape[1],
                   align_depth=ALIGN_DEPTH, teacher_dim=None, projector=PROJECTOR)
    if data.shape[1] % network["patch_size"] or ("bottleneck_dim" in network and data.vae):
        raise ValueError(f"MODEL {MODEL!r} does not fit the {'latents' if data.vae else 'pixels'} of {DATA_DIR}, "
                         f"{data.shape}; its patch must divide the side, and a JiT needs prepare_latents.VAE = None")
    if "context_dim" not in network:
        return dict(network, num_classes=len(data.classes), class_dropout_prob=LABEL_DROPOUT)
    if data.captions is None:
        raise ValueError(f"MODEL {MODEL!r} learns from captions, of which {DATA_DIR} has none; "
                         "prepare images that have some, or choose a SiT")
    return network


@ends_in_one_line
def main():
    # processes and precision
    rank, world, device = start_processes(nccl=True)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs
    precision = torch.bfloat16 if has_bf16(device) else torch.float32
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16)

    # data, and where the run stands: phase II opens images only where they are the training data
    check_settings(world)
    open_data = partial(PreparedDataset, DATA_DIR)
    data = open_data(with_images=False)
    network = network_arguments(data)
    encoder = None
    if "context_dim" in network:
        encoder = TextEncoder(TEXT_ENCODER, TEXT_LENGTH).to(device, precision)
        network["context_dim"] = encoder.dim
    run = Path(RUN_DIR)
    settings = checkpoint.describe(globals(), data, network)
    saved, progress = checkpoint.find(run, settings, FROZEN)
    step, aligning, cosine = progress["step"], progress["aligning"], progress["cosine"]
    if CLASS_WEIGHT:  # REG: the state is wider by the teacher's class token
        tokens = ClassTokens(data, settings, data.shape[1] // network["patch_size"], world)
        network["cls_dim"] = settings["sit"]["cls_dim"] = tokens.dim
    initial, begun = initial_weights(INIT_FROM, network, settings) if INIT_FROM and not saved else ({}, "")
    if CLASS_WEIGHT:  # those of all images, once for all runs, so that phase II needs neither teacher nor images
        begun += tokens.compute(WORKERS, rank, device)
        open_data, data = tokens.open, tokens.open(with_images=False)

    def phase_one_is_over():
        return step >= ALIGN_STEPS or (TRIGGER == "conflict" and cosine is not None and cosine < CONFLICT_BELOW)

    if phase_one_is_over() or not (FEATURE_WEIGHT or ATTENTION_WEIGHT):
        aligning = False  # once False, for good

    # what turns labels into what the model takes: classes as they are, captions to their embeddings
    captions, context_of, null = None, lambda y: y, len(data.classes)
    if encoder is not None:
        captions = context_of = CaptionTable(encoder, data.captions, TEXT_TABLE_GIB)
        null = captions.null
    del encoder  # the table has it if it needs it

    # teacher, if this run starts in phase I
    teacher, align = None, alignment_losses
    if aligning:
        data = open_data()
        layers = [layer for _, layer in LAYER_PAIRS] if ATTENTION_WEIGHT else []
        teacher = teacher_for_grid(TEACHER, layers, grid=data.shape[1] // network["patch_size"]).to(device)
        if FEATURE_WEIGHT:
            network["teacher_dim"] = teacher.dim
    with_vae = PREVIEW_EVERY and data.vae and rank == 0
    vae = load_vae(data.vae["name"], data.vae["scale"])[0].to(device) if with_vae else None

    # model, optimiser, EMA
    torch.manual_seed(seed_from(SEED, 3))
    model = make_network(network).to(device)
    model.load_state_dict(initial, strict=False)
    model.activation_checkpointing = ACTIVATION_CHECKPOINTING
    model.bf16_tokens = RESIDUAL_PRECISION == "bf16" and precision == torch.bfloat16
    times_of = spread_times
    if COMPILE:  # block by block: one compilation serves all, and FSDP gathers between them
        for part in (*model.blocks, model.final_layer, *([teacher] if aligning else [])):
            part.forward = torch.compile(part.forward, fullgraph=True, dynamic=False)
        align = torch.compile(alignment_losses, fullgraph=True, dynamic=False)
        times_of = torch.compile(spread_times, fullgraph=True, dynamic=False)
    shards = 1 if SHARDING == "replicate" else int(os.environ.get("LOCAL_WORLD_SIZE", world))
    # of several nodes, sharded inside each, replicated between them; on one GPU gathering casts to bf16
    sharded = dist.is_initialized()
    group = shard(model, device, world, shards, precision) if sharded else None
    optimizer = make_optimizer(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    trained_shards = optimizer.param_groups[0]["params"]
    ema = {name: p.detach().clone() for name, p in model.named_parameters() if not name.startswith("projectors.")}
    with torch.no_grad():
        ema_shards = [local(average) for average in ema.values()]
        averaged_shards = [local(p) for p in model.parameters()][: len(ema)]
    update_ema = torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY)
    meters = torch.zeros(8 + bool(CLASS_WEIGHT), dtype=torch.float64, device=device)  # sums since the last log
    by_time = torch.zeros(2, 10, dtype=torch.float64, device=device)  # likewise, or since this run was resumed
    if saved:
        checkpoint.load(saved, checkpoint.run_state(model, optimizer, ema, meters))

    # the run's folder, and what the run will cost
    logs = {**LOGS, "log.csv": (*LOGS["log.csv"], *["class_loss"] * bool(CLASS_WEIGHT))}
    checkpoint.open_run(run, settings, saved, step, logs, rank, __file__)
    track = checkpoint.open_tracker(TRACKER, run, settings, step) if rank == 0 else None

    def log(text):
        if rank == 0:
            tqdm.write(text)
            checkpoint.append(run / "log.txt", text)

    share = BATCH_SIZE // world
    micro = share // MICRO_BATCHES
    drawn = math.prod(model.state_shape) * (BATCH_SIZE if drawn_whole(model.state_shape, data.vae is None) else share)
    memory = costs.check_memory(model, teacher, captions, share, MICRO_BATCHES, shards, precision, device, 8 * drawn)
    peak_rate = world * costs.matrix_rate(device, precision)
    flops = costs.flops_per_image(model, teacher, captions)
    log(f"{begun}{MODEL}, {sum(p.numel() for p in model.parameters()):,} parameters, {len(data):,} images, {world} x "
        f"{device.type}, {precision}, {costs.attention_kernel(model, precision, device)}, phase "
        f"{'I' if aligning else 'II'} from step {step:,}\n{costs.estimate(memory, flops, peak_rate, BATCH_SIZE)}")

    if not progress["aligning"] and step < ALIGN_STEPS != progress["settings"].get("ALIGN_STEPS"):
        log(f"phase I has ended before step {step:,}, for good: ALIGN_STEPS {ALIGN_STEPS:,} changes nothing")
    if too_short := too_short_for_ema(STEPS, EMA_DECAY):
        log(too_short)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    gc.freeze()
    gc.disable()  # each rank would collect, and make others wait, at another time: all do when they log
    signals = collect_stops()  # from here on a stop lets all processes finish the step and save
    batches = open_batches(data, range(step, min(STEPS, ALIGN_STEPS) if aligning else STEPS), rank, world, device)
    bar = tqdm(total=STEPS, initial=step, unit="step", disable=rank > 0)
    first_step = logged_step = step
    clock, stopped_by, failure = time.perf_counter(), 0, None
    while step < STEPS and not stopped_by:
        # the switch: teacher, projector and the teacher's images go for good
        if aligning and phase_one_is_over():
            aligning, teacher, align, model.projectors = False, None, None, None
            trained = [p for p in model.parameters() if p.requires_grad]
            while len(trained_shards) > len(trained):  # the projector's are the last
                del optimizer.state[trained_shards.pop()]
            flops = costs.flops_per_image(model, teacher, captions)
            data = open_data(with_images=False)
            batches = open_batches(data, range(step, STEPS), rank, world, device)
            gc.unfreeze()
            gc.collect()  # a compiled teacher refers to itself
            gc.freeze()
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            log(f"step {step:,}: phase II, plain {MODEL}; teacher and projector are gone")

        # ----- the training step ------------------------------------------------------------------
        moments, labels, images, *cls = next(batches)  # images: uint8 [B, 3, H, W], None in phase II; of REG cls [B, E]
        posterior_noise, noise, t, drop = draw_noise(step, model.state_shape, rank, world, device, 1, data.vae is None)
        x = clean_state(data, moments, posterior_noise, *cls)  # [B, C, h, w], or of REG packed
        t, y = times_of(t), torch.where(drop < LABEL_DROPOUT, null, labels)

        torch.manual_seed(seed_from(SEED, 7, step, rank))  # of a JiT's dropout
        step_losses, step_by_time = torch.zeros(3 + bool(CLASS_WEIGHT), device=device), 0  # as stacked below
        for i in range(MICRO_BATCHES):
            part = slice(i * micro, (i + 1) * micro)
            if sharded and MICRO_BATCHES > 1:  # gradients, and but for zero3 weights, travel once a step
                model.set_requires_gradient_sync(i + 1 == MICRO_BATCHES)
                model.set_reshard_after_backward(i + 1 == MICRO_BATCHES or SHARDING == "zero3")
            context = context_of(y[part])
            with autocast():
                denoising, feature, attention, each, *of_class = compute_losses(
                    model, teacher, x[part], noise[part], t[part], context, images[part] if aligning else None, align)
            loss = denoising + FEATURE_WEIGHT * feature + ATTENTION_WEIGHT * attention
            if CLASS_WEIGHT:
                loss = loss + CLASS_WEIGHT * of_class[0]
            (loss / MICRO_BATCHES).backward()
            step_losses += torch.stack([denoising, feature, attention, *of_class]).detach() / MICRO_BATCHES
            step_by_time += sums_by_time(each, t[part])
        if world > 1:
            dist.all_reduce(step_losses)
            step_losses /= world

        with torch.no_grad():
            for p, mine in zip(trained, trained_shards):
                mine.grad = local(p.grad)
        grad_norm = clip_gradients(trained_shards, group)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, (step + 1) / (WARMUP_STEPS + 1))
        bad = (~torch.isfinite(step_losses.sum() + grad_norm)).float()  # the same on all ranks
        optimizer.found_inf = bad  # 1: the fused step changes nothing, decided on the device
        optimizer.step()
        for p in (*trained, *trained_shards):
            p.grad = None
        update_ema(ema_shards, averaged_shards, None)

        # meters: sums of losses and of the gradient norm over good steps, their count; skipped: in a row, most, in all
        meters[:-3] += torch.where(bad > 0, 0, torch.cat([step_losses, grad_norm[None], torch.ones_like(bad)[None]]))
        meters[-3] = (meters[-3] + bad) * bad
        meters[-2] = torch.maximum(meters[-3], meters[-2])
        meters[-1] += bad
        by_time += torch.where(bad > 0, 0, step_by_time)
        step += 1
        # ------------------------------------------------------------------------------------------

        bar.update()
        if step == first_step + 1:
            log(f"step {step:,}: {costs.peak_gib(device):.3g} GiB used at most")
        if aligning and CONFLICT_EVERY and step >= CONFLICT_FROM and step % CONFLICT_EVERY == 0:
            paused = time.perf_counter()
            cosine = gradient_cosine(model, teacher, align, data, context_of, rank, world, device, autocast)
            log(f"step {step:,}: gradient cosine {cosine:+.3f} between denoising and alignment loss")
            clock += time.perf_counter() - paused  # no training time

        if (LOG_EVERY and step % LOG_EVERY == 0) or step == STEPS or (aligning and step == ALIGN_STEPS):
            *sums, good, _, in_a_row, skipped = meters.tolist()  # here alone the loop waits for the device
            if world > 1:
                dist.all_reduce(by_time)
            losses_by_time, counts = by_time.tolist()
            gc.collect()
            meters[:-3], meters[-2], by_time[:] = 0, meters[-3], 0
            now = time.perf_counter()
            seconds = (now - clock) / (step - logged_step)  # per step
            logged_step, clock = step, now
            images_per_s = BATCH_SIZE / seconds
            mfu = images_per_s * flops / peak_rate
            denoising, feature, attention, *of_class, norm = (value / good if good else float("nan") for value in sums)
            row = (step, 1 if aligning else 2, denoising, feature, attention, norm, cosine, int(skipped), images_per_s,
                   seconds * 1000, mfu, costs.peak_gib(device), *of_class)
            if rank == 0:
                means = (total / count if count else None for total, count in zip(losses_by_time, counts))
                checkpoint.append_row(run / "log.csv", row)
                checkpoint.append_row(run / "loss_by_time.csv", (step, *means))
                track(step, {key: value for key, value in zip(logs["log.csv"], row) if value is not None})
            bar.set_postfix_str(f"loss {denoising:.3f} feat {feature:+.3f} attn {attention:.3f} "
                                f"norm {norm:.2f} {images_per_s:.0f} img/s, {mfu:.0%} MFU")
            if in_a_row >= MAX_SKIPPED:
                raise FloatingPointError(f"step {step}: the loss was not finite in {int(in_a_row)} steps in a row; the "
                                         f"last checkpoint is untouched: lower LEARNING_RATE or look at {DATA_DIR}")

        paused = time.perf_counter()
        if world == 1 or step % 10 == 0:  # ranks must leave at the same step: they agree, every tenth
            agreed = torch.tensor(max(signals, default=0))  # on the host: no wait for the GPU
            if world > 1:
                dist.all_reduce(agreed, dist.ReduceOp.MAX)
            stopped_by = agreed.item()
        if PREVIEW_EVERY and (step % PREVIEW_EVERY == 0 or step == STEPS):
            if weights := checkpoint.whole_ema(ema):  # of all ranks, on rank 0
                picture = run / f"previews/step_{step:07d}.png"
                save_preview(picture, weights, settings, vae, device, PREVIEW_GRID, PREVIEW_STEPS, SEED, null,
                             context_of, data.captions if captions else None)
                track(step, dict(preview=picture))
        if (CHECKPOINT_EVERY and step % CHECKPOINT_EVERY == 0) or step == STEPS or stopped_by:
            progress = dict(step=step, aligning=aligning, cosine=cosine)
            state = checkpoint.run_state(model, optimizer, ema, meters)
            failure = checkpoint.save(run, settings, progress, state, ema, CHECKPOINTS_KEPT, KEEP_EVERY)
            if failure:
                log(f"step {step:,}: checkpoint not written ({failure}); the one before stays, the run goes on")
        clock += time.perf_counter() - paused

    bar.close()
    if sharded:
        dist.destroy_process_group()
    if failure:
        raise OSError(f"step {step}: checkpoint not written ({failure}); make room in {run} and "
                      "run the same command again: it resumes from the checkpoint before")
    if stopped_by:
        log(f"step {step:,}: stopped by a signal and saved; the same command resumes")
        sys.exit(exit_status(stopped_by))
    log(f"step {step:,}: done; raise STEPS to train on, or draw samples with sample.py{too_short and f'. {too_short}'}")


if __name__ == "__main__":
    run_script(main)
