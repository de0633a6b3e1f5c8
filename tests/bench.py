"""Step times of plain SiT, phase I and phase II, side by side in one run.

    PYTHONPATH=. python tests/bench.py

Prints the median time of a whole step (forward, losses, backward, clipping, AdamW, EMA), ratios to plain SiT, the share
of the measured matrix rate, and the peak memory of each kind (on a CPU: of a process of its own). The teacher is a
DINOv2-B with random weights: its speed is that of the real one.
"""

import multiprocessing
import resource
import statistics
import time

import timm
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

import train
from model import build
from teacher import Teacher

CUDA = torch.cuda.is_available()
MODEL, ALIGN_DEPTH, LAYER_PAIRS = ("SiT-XL/2", 8, [(4, 8), (5, 9), (6, 10), (7, 11)]) if CUDA else \
    ("SiT-B/2", 5, [(2, 7), (3, 9), (4, 11)])
TEACHER = "vit_base_patch14_dinov2.lvd142m"
BATCH_SIZE = 64 if CUDA else 4
IMAGE_SIZE = 256
ROUNDS = 30 if CUDA else 4  # of one step of each kind in turn
WARMUP = 5 if CUDA else 1  # rounds that do not count
COMPILE = CUDA
KINDS = ("plain SiT", "phase I", "phase II")


def make_step(kind):
    """A function that makes one training step of the kind, on random data."""
    device = torch.device("cuda" if CUDA else "cpu")
    train.LAYER_PAIRS, train.ALIGN_DEPTH = LAYER_PAIRS, ALIGN_DEPTH
    torch.manual_seed(0)
    model = build(MODEL, align_depth=ALIGN_DEPTH, teacher_dim=None if kind == "plain SiT" else 768).to(device)
    optimizer = train.make_optimizer(model)
    ema = {name: p.detach().clone() for name, p in train.ema_parameters(model).items()}
    update_ema = get_ema_multi_avg_fn(0.9999)
    teacher = None
    if kind == "phase I":
        network = timm.create_model(TEACHER, pretrained=False, num_classes=0)
        teacher = Teacher(network, [layer for _, layer in LAYER_PAIRS], model.grid * 14).to(device)
        teacher = torch.compile(teacher) if COMPILE else teacher
    if kind == "phase II":
        optimizer = train.drop_projector(model, optimizer)
    student = torch.compile(model) if COMPILE else model
    x, noise = torch.randn(2, BATCH_SIZE, 4, 32, 32, device=device)
    t, y = torch.rand(BATCH_SIZE, device=device), torch.randint(0, 1000, (BATCH_SIZE,), device=device)
    images = torch.randint(0, 256, (BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, device=device)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=CUDA):
            denoising, feature, attention = train.compute_losses(student, teacher, x, noise, t, y, images)
        (denoising + 0.5 * feature + 0.5 * attention).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(list(ema.values()), list(train.ema_parameters(model).values()), None)
    return step


def timed(function):
    started = time.perf_counter()
    function()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_memory(kind, result):
    """GiB at most in use by a process that makes two steps of this kind alone."""
    step = make_step(kind)
    step(), step()
    peak = torch.cuda.max_memory_allocated() if CUDA else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result.put(peak / 2**30)


def matrix_rate():
    """FLOP/s of a large matrix product in the precision of the step, the best of ten."""
    n, dtype = (8192, torch.bfloat16) if CUDA else (2048, torch.float32)
    a, b = torch.randn(2, n, n, dtype=dtype, device="cuda" if CUDA else "cpu")
    return 2 * n**3 / min(timed(lambda: a @ b) for _ in range(10))


def main():
    spawn = multiprocessing.get_context("spawn")
    memory = {}
    for kind in KINDS:
        result = spawn.Queue()
        process = spawn.Process(target=peak_memory, args=(kind, result))
        process.start()
        memory[kind] = result.get()
        process.join()

    if CUDA:
        torch.set_float32_matmul_precision("high")
    steps = {kind: make_step(kind) for kind in KINDS}
    times = {kind: [] for kind in KINDS}
    for _ in range(WARMUP + ROUNDS):
        for kind, step in steps.items():
            times[kind].append(timed(step))
    with FlopCounterMode(display=False) as counter:  # the same for plain and phase II; the teacher is not counted
        with torch.compiler.set_stance("force_eager"):
            steps["plain SiT"]()
    flop, rate = counter.get_total_flops(), matrix_rate()
    name = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    print(f"{MODEL}, batch {BATCH_SIZE}, {'bf16, compiled' if CUDA else 'float32'}, torch {torch.__version__}, {name}; "
          f"measured matrix rate {rate / 1e12:.2f} TFLOP/s")
    print(f"{'':12}{'ms / step':>10}{'images/s':>10}{'/ plain':>9}{'MFU':>7}{'peak GiB':>10}")
    for kind in KINDS:
        counted = times[kind][WARMUP:]
        median = statistics.median(counted)
        # ratios pair the steps of one round, so that a slow moment of the machine hits both sides
        ratio = statistics.median(a / b for a, b in zip(counted, times["plain SiT"][WARMUP:]))
        print(f"{kind:12}{median * 1000:>10.1f}{BATCH_SIZE / median:>10.1f}{ratio:>9.3f}{flop / median / rate:>7.1%}"
              f"{memory[kind]:>10.2f}")


if __name__ == "__main__":
    main()
