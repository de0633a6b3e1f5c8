"""All that only a GPU can tell, in ten minutes by estimate: one table, and one JSON to send to the project.

    python -m tests.gpu
    torchrun --nproc_per_node=8 -m tests.gpu    # afterwards: how ways of sharding agree and what they cost

The networks have random weights and the images are noise, whose speed is that of the real ones. Nothing is fetched. A
part that fails says why, and the others go on.
"""

if not __package__:
    raise SystemExit("run it from the repository's root: python -m tests.gpu")

import gc
import itertools
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

import checkpoint
import class_tokens
import prepare_latents
import sample
import train
from dataset import open_loader
from images import ImageFiles
from inception import InceptionV3
from model import build
from runtime import start_processes
from teacher import teacher_for_grid
from vae import AutoencoderKL

OUT = "out/gpu.json"
MODEL, SMALL = "SiT-XL/2", "SiT-B/2"
IMAGES = (32, 64, 128, 256)  # of a GPU in a step
SHARDINGS = ("zero2", "zero3", "replicate")
STEPS, FLAT_STEPS = 30, 500
number = itertools.count()  # of the run
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
KERNELS = (("communication", "nccl"), ("attention", "flash|fmha|sdpa|attention"), ("copies", "memcpy|memset"),
           ("matrix products", "gemm|nvjet|cutlass|xmma|cublas|splitk"), ("Triton", "triton"), ("others", ""))


def seconds(function, repeat=20):
    """Mean time of a call once it is warm."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeat):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeat


def make_images(folder):
    """Random images and moments in the shapes of ImageNet 256 x 256, laid out as REPA's preprocessing does."""
    rng = np.random.default_rng(0)
    for part in ("images", "vae-sd"):
        (folder / "published" / part).mkdir(parents=True)
    for i in range(512):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((256, 256)).save(folder / f"published/images/{i:05d}.png", compress_level=1)
        np.save(folder / f"published/vae-sd/{i:05d}.npy", rng.random((8, 32, 32), np.float32) - 0.5)
    labels = [(f"{i:05d}.npy", i * 999 // 511) for i in range(512)]  # of 0..999
    (folder / "published/vae-sd/dataset.json").write_text(json.dumps(dict(labels=labels)))


def run(folder, **constants):
    """Rows of log.csv and text of log.txt of a training run with these constants, in a folder of its own."""
    defaults = dict(DATA_DIR=str(folder / "data"), RUN_DIR=str(folder / f"run{next(number)}"), MODEL=SMALL, STEPS=8,
                    ALIGN_STEPS=0, LOG_EVERY=1, CHECKPOINT_EVERY=0, PREVIEW_EVERY=0, CONFLICT_EVERY=0,
                    BATCH_SIZE=32 * WORLD, MICRO_BATCHES=1, SHARDING="zero2", COMPILE=True)
    for name, value in (defaults | constants).items():
        setattr(train, name, value)
    train.main()
    lines = [line.split(",") for line in Path(train.RUN_DIR, "log.csv").read_text().splitlines()]
    return [dict(zip(lines[0], line)) for line in lines[1:]], Path(train.RUN_DIR, "log.txt").read_text()


def watched(function, at):
    """train.draw_noise that first calls function(step) at the steps `at`."""
    def draw(step, *args, draw_noise=train.draw_noise, **options):
        if step in at:
            function(step)
        return draw_noise(step, *args, **options)
    return draw


def machine(folder):
    n, card = 8192, torch.cuda.get_device_properties(0)
    a, b = torch.randn(2, n, n, dtype=torch.bfloat16, device="cuda")
    big, target = torch.empty(2, 2**30, dtype=torch.uint8, device="cuda")
    driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"],
                            capture_output=True, text=True).stdout if shutil.which("nvidia-smi") else ""
    return dict(card=card.name, gib=card.total_memory / 2**30, multiprocessors=card.multi_processor_count, gpus=WORLD,
                driver=driver.strip(), cuda=torch.version.cuda, nccl=".".join(map(str, torch.cuda.nccl.version())),
                **{name: version(name) for name in ("torch", "triton", "timm", "numpy")},
                bf16_tflops=2 * n**3 / seconds(lambda: a @ b, 200) / 1e12,
                copy_gb_per_s=2 * 2**30 / seconds(lambda: target.copy_(big)) / 1e9)


def attend(q, k, v):
    """Attention's forward pass, and where they are trained its backward pass."""
    out = F.scaled_dot_product_attention(q, k, v)
    if q.requires_grad:
        out.backward(out)


def attention(folder):
    """ms of each kernel: the student's heads of 72 forward and backward, with REG's one token more, and padded to a
    multiple of 8 for it; the teacher's of 64 forward."""
    found = {}
    for who, heads, N, width, train_it in (("student", 16, 256, 72, True), ("REG's student", 16, 257, 72, True),
                                           ("padded", 16, 264, 72, True), ("teacher", 12, 257, 64, False)):
        q, k, v = (torch.randn(32, heads, N, width, dtype=torch.bfloat16, device="cuda", requires_grad=train_it)
                   for _ in range(3))
        found[f"{who}, chosen"] = SDPBackend(torch._fused_sdp_choice(q, k, v)).name
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            try:
                with sdpa_kernel([backend]):
                    found[f"{who}, {backend.name}"] = seconds(partial(attend, q, k, v)) * 1e3
            except RuntimeError as error:
                found[f"{who}, {backend.name}"] = str(error).splitlines()[0]
    return found


def profile():
    """(a function for watched(), dict that it fills with the kernels' groups in ms a step): of steps 20 to 24."""
    groups, profiler = {}, torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def start_or_stop(step):
        torch.cuda.synchronize()
        groups.setdefault("since", time.perf_counter())
        if step == 20:
            profiler.start()
        else:
            profiler.stop()
            took = (time.perf_counter() - groups.pop("since")) * 1e3 / 4
            for event in profiler.key_averages():
                group = next(name for name, sign in KERNELS if re.search(sign, event.key.lower()))
                groups[group] = groups.get(group, 0) + event.self_device_time_total / 1e3 / 4
            groups["idle"] = took - sum(groups.values())
    return start_or_stop, groups


def training(folder, images, kind, **constants):
    """A step of `kind`, MODEL, from log.csv: ms, images/s, MFU, peak beside the estimate, and the kernels' groups."""
    start_or_stop, groups = profile()
    draw, save = train.draw_noise, checkpoint.save
    train.draw_noise, checkpoint.save = watched(start_or_stop, (20, 24)), lambda *args: None
    try:
        rows, text = run(folder, MODEL=MODEL, STEPS=STEPS, LOG_EVERY=5, BATCH_SIZE=images * WORLD,
                         ALIGN_STEPS=STEPS if kind == "I" else 0, **constants)
    finally:
        train.draw_noise, checkpoint.save = draw, save
    good = [row for row in rows if int(row["step"]) in (15, 20, 30)]  # warm, and not those of the profiler
    values = {key: float(np.median([float(row[key]) for row in good])) for key in ("step_ms", "images_per_s", "mfu")}
    estimate = re.search(r"about ([\d.]+) GiB", text)[1]
    return dict(values, peak_gib=float(rows[-1]["peak_gib"]), estimate_gib=float(estimate),
                **{f"{name}, ms": ms for name, ms in groups.items()})


def switch(folder):
    """Phase II after phase I, beside plain SiT's ms of a step above: what the teacher leaves behind."""
    compiled, draw, save = {}, train.draw_noise, checkpoint.save
    counts = torch._dynamo.utils.counters["stats"]
    train.draw_noise = watched(lambda step: compiled.setdefault(step, counts["unique_graphs"]), (14, 17, 29))
    checkpoint.save = lambda *args: None
    try:
        rows, _ = run(folder, MODEL=MODEL, STEPS=STEPS, ALIGN_STEPS=15, LOG_EVERY=5)
    finally:
        train.draw_noise, checkpoint.save = draw, save
    return dict(step_ms=float(rows[-1]["step_ms"]), peak_gib=float(rows[-1]["peak_gib"]),
                graphs_at_the_switch=compiled[17] - compiled[14], graphs_after=compiled[29] - compiled[17])


def precision(folder):
    """Losses and gradients of one batch: bf16 and compiled beside float32 and eager, SMALL with the teacher."""
    torch.manual_seed(0)
    model = build(SMALL, align_depth=5).cuda()
    for p in model.parameters():  # zero at first: velocity and most gradients would be
        torch.nn.init.normal_(p, std=0.02) if p.requires_grad and not p.any() else None
    teacher = teacher_for_grid("vit_base_patch14_dinov2.lvd142m", [7, 9, 11], 16).cuda()
    train.LAYER_PAIRS, train.ATTENTION_WEIGHT, train.FEATURE_WEIGHT = [(2, 7), (3, 9), (4, 11)], 0.5, 0.5
    x, noise = torch.randn(2, 16, 4, 32, 32, device="cuda")
    t, y = torch.rand(16, device="cuda"), torch.randint(0, 1000, (16,), device="cuda")
    images, found = torch.randint(0, 256, (16, 3, 256, 256), dtype=torch.uint8, device="cuda"), {}
    torch.set_float32_matmul_precision("highest")
    for kind in ("float32", "bf16"):
        align, compiled = train.alignment_losses, kind == "bf16"
        if compiled:
            for part in (*model.blocks, model.final_layer, teacher):
                part.forward = torch.compile(part.forward, fullgraph=True, dynamic=False)
            align = torch.compile(align, fullgraph=True, dynamic=False)
        with torch.autocast("cuda", torch.bfloat16, enabled=compiled):
            losses = torch.stack(train.compute_losses(model, teacher, x, noise, t, y, images, align)[:3])
        losses.sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found[kind] = losses.tolist(), gradient
        model.zero_grad()
    (exact, g), (rounded, h) = found["float32"], found["bf16"]
    return dict(losses_float32=exact, losses_bf16=rounded, gradient_cosine=F.cosine_similarity(g, h, dim=0).item(),
                gradient_difference=((g - h).norm() / g.norm()).item())


def bad_batch(folder):
    """A batch of NaN is skipped: how many were, and the losses around it."""
    latents, calls = class_tokens.sample_latents, []

    def damaged(*args):
        calls.append(1)
        return latents(*args) * (float("nan") if len(calls) == 4 else 1)
    class_tokens.sample_latents = damaged
    try:
        rows, _ = run(folder)
    finally:
        class_tokens.sample_latents = latents
    return dict(skipped=int(rows[-1]["skipped"]), losses=[float(row["denoising_loss"]) for row in rows])


def resume(folder):
    """Losses of a run, and of the same run resumed in its middle."""
    whole, _ = run(folder, CHECKPOINT_EVERY=4)
    shutil.rmtree(Path(train.RUN_DIR, "checkpoints/step_0000008"))
    again, _ = run(folder, CHECKPOINT_EVERY=4, RUN_DIR=train.RUN_DIR)
    return {name: [float(row["denoising_loss"]) for row in rows]
            for name, rows in (("whole", whole), ("resumed", again))}


def flat(folder):
    """Live objects and GPU memory of SiT-S/2 at two steps: what grows between them is a leak."""
    seen = {}

    def look(step):
        gc.collect()
        seen[step] = len(gc.get_objects()), torch.cuda.memory_allocated()
    draw, train.draw_noise = train.draw_noise, watched(look, (20, 20 + FLAT_STEPS))
    try:
        run(folder, MODEL="SiT-S/2", STEPS=FLAT_STEPS + 22, LOG_EVERY=50)
    finally:
        train.draw_noise = draw
    (objects, memory), (objects_later, memory_later) = seen.values()
    return dict(steps=FLAT_STEPS, more_objects=objects_later - objects, more_bytes=memory_later - memory)


def other_speeds(folder):
    """Images per second of sampling as in the paper, VAE, Inception, and of the loader that feeds the VAE."""
    found, vae = {}, AutoencoderKL().cuda().eval().requires_grad_(False)
    images = torch.randint(0, 256, (64, 3, 256, 256), dtype=torch.uint8, device="cuda")
    save_file(vae.state_dict(), folder / "vae.safetensors")
    run(folder, MODEL=MODEL, STEPS=1)
    sample.RUN_DIR, sample.VAE, sample.STEPS = train.RUN_DIR, str(folder / "vae.safetensors"), 10
    sampler = sample.Sampler(Path(train.RUN_DIR, "ema.safetensors"), torch.device("cuda"))
    draw = partial(sampler.draw, range(64), [0] * 64)
    draw()
    sample.STEPS = 250
    found["sampling, 250 steps, guidance as in the paper"] = 64 / seconds(draw, 1)
    torch.backends.cudnn.benchmark = True
    vae.to(memory_format=torch.channels_last).encode = torch.compile(vae.encode)
    for name in ("float32", "bf16"):
        prepare_latents.VAE_PRECISION = name
        found[f"VAE encoding, {name}"] = 64 / seconds(lambda: prepare_latents.encode(images, vae, images.device))
    crops = prepare_latents.Crops(ImageFiles(folder / "published"), 256, None)
    loader = open_loader(crops, [range(i, i + 64) for i in range(0, 512, 64)] * 4, 16, images.device)
    next(loader)
    started = time.perf_counter()
    found["loader for the VAE, 16 workers at most"] = 64 * sum(1 for _ in loader) / (time.perf_counter() - started)
    inception = InceptionV3().cuda().eval()
    with torch.no_grad():
        found["Inception"] = 64 / seconds(lambda: inception(images))
    return found


def agreement(folder):
    """Losses of eight steps in each way of sharding, and of one process where OUT has them."""
    return {sharding: [float(row["denoising_loss"]) for row in run(folder, SHARDING=sharding, BATCH_SIZE=256)[0]]
            for sharding in SHARDINGS} if WORLD > 1 else \
        {"one process": [float(row["denoising_loss"]) for row in run(folder, BATCH_SIZE=256, MICRO_BATCHES=4)[0]]}


def main():
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    start_processes(nccl=True)
    create = timm.create_model
    timm.create_model = lambda name, pretrained=False, **options: create(name, pretrained=False, **options)
    results = json.loads(Path(OUT).read_text()) if WORLD > 1 and Path(OUT).exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        folders = [folder]
        if WORLD > 1:  # all use that of the first process
            dist.broadcast_object_list(folders, 0)
        folder = Path(folders[0])
        if RANK == 0:
            make_images(folder)
        if WORLD > 1:
            dist.barrier()
        prepare_latents.SOURCE, prepare_latents.DATA_DIR = str(folder / "published"), str(folder / "data")
        prepare_latents.main()
        parts = {"machine": machine, "agreement": agreement}
        for images in IMAGES if WORLD == 1 else IMAGES[:1]:
            for kind in ("I", "II"):
                for sharding in SHARDINGS if WORLD > 1 else ("one GPU",):
                    constants = dict(SHARDING=sharding) if WORLD > 1 else {}
                    parts[f"phase {kind}, {images} images, {sharding}"] = partial(training, images=images, kind=kind,
                                                                                  **constants)
        if WORLD == 1:
            parts |= dict(attention=attention, switch=switch, precision=precision, bad_batch=bad_batch, resume=resume,
                          flat=flat, other_speeds=other_speeds)
        for name, part in parts.items():
            started, key = time.perf_counter(), f"{name}, {WORLD} GPUs" if WORLD > 1 else name
            try:
                results[key] = part(folder)
            except Exception as error:  # said, and the other parts go on
                results[key] = dict(error=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()
            if RANK == 0:
                print(f"\n{key} ({time.perf_counter() - started:.0f} s)")
                for label, value in results[key].items():
                    print(f"  {label:50} {f'{value:.4g}' if isinstance(value, float) else value}")
                Path(OUT).parent.mkdir(parents=True, exist_ok=True)
                Path(OUT).write_text(json.dumps(results, indent=1))
    if RANK == 0:
        print(f"\n{OUT}: please attach it to an issue of the project")


if __name__ == "__main__":
    main()
