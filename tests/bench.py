"""Speeds, side by side in one run.

    python -m tests.bench train         # steps of plain SiT, phase I and phase II
    python -m tests.bench text          # steps of MMDiT/2 with captions from a table, and encoded at each step
    python -m tests.bench attention     # the attention loss of 1,024 tokens in pieces, and at once
    python -m tests.bench data          # preparing and loading images
    python -m tests.bench fid           # precision and recall, features of the FID Inception
    python -m tests.bench checkpoint    # how long training waits for one; also under torchrun

The first prints the median time of a whole step (forward, losses, backward, clipping, AdamW, EMA), ratios to plain SiT,
MFU (costs.flops_per_image), and the peak memory of each kind (on a CPU: of a process of its own). The teacher is a
DINOv2-B with random weights: its speed is that of the real one.

The second measures the same of an MMDiT, on a CPU of fewer blocks, and then steps of the full size with and without a
text encoder of the default's size, random weights, in turn.

The third measures forward and backward pass of the loss in four layer pairs of 12 heads, as at 512 x 512: time in turn,
and what a process of its own has in use more than one that makes queries and keys alone.

The fourth measures, on JPEGs made here that compress as photographs do: decoding, cropping and packing on one core
beside Pillow's bare decoding and resizing; the loader with one worker; a data set of ImageNet's size; and on a GPU the
VAE's encoder (random weights).

The fifth measures precision and recall of 50,000 against 10,000 images in 2,048 random features, with the process's
peak memory, and the Inception in turn with pytorch-fid's of the same random weights.

The sixth saves SiT-B/2 and SiT-XL/2 with optimiser and EMA three times each, in a temporary folder.
"""

if not __package__:
    raise SystemExit("run it from the repository's root: python -m tests.bench")

import io
import json
import multiprocessing
import resource
import shutil
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import timm
import torch
from PIL import Image
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import fid
import prepare_latents
import train
from costs import flops_per_image, matrix_rate
from dataset import FORMAT, PreparedDataset
from images import ImageFiles
from inception import InceptionV3
from losses import attention_loss, attention_loss_of_qk
from model import MODELS, attention_logits, build
from prepare_latents import Crops, encode
from runtime import start_processes
from teacher import Teacher
from text import CaptionTable, TextEncoder
from vae import AutoencoderKL

CUDA = torch.cuda.is_available()
MODEL, ALIGN_DEPTH, LAYER_PAIRS = ("SiT-XL/2", 8, [(4, 8), (5, 9), (6, 10), (7, 11)]) if CUDA else \
    ("SiT-S/2", 5, [(2, 7), (3, 9), (4, 11)])
TEACHER = "vit_base_patch14_dinov2.lvd142m"
BATCH_SIZE = 64 if CUDA else 4
IMAGE_SIZE = 256
ROUNDS = 30 if CUDA else 8  # of one step of each kind in turn
WARMUP = 5 if CUDA else 1  # rounds that do not count
COMPILE = CUDA
TEXT_BATCH_SIZE = 64 if CUDA else 2
KINDS = ("plain", "phase I", "phase II")
TABLE = SimpleNamespace(ids=torch.empty(1, 77), cost=lambda: (0, 0))  # of captions, for flops_per_image


def step_of(model, teacher, align, y, context_of):
    """A function that makes one training step on random data; y [B]: see context_of, which a call may replace."""
    device, batch_size = y.device, len(y)
    optimizer = train.make_optimizer(model)
    averaged = [p for name, p in model.named_parameters() if not name.startswith("projectors.")]
    ema = [p.detach().clone() for p in averaged]
    update_ema = get_ema_multi_avg_fn(0.9999)
    x, noise = torch.randn(2, batch_size, 4, 32, 32, device=device)
    t = torch.rand(batch_size, device=device)
    images = torch.randint(0, 256, (batch_size, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, device=device)

    def step(context_of=context_of):
        context = context_of(y)
        with torch.autocast(device.type, torch.bfloat16, enabled=CUDA):
            denoising, feature, attention, _ = train.compute_losses(model, teacher, x, noise, t, context, images, align)
        (denoising + 0.5 * feature + 0.5 * attention).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(ema, averaged, None)
    return step


def make_step(kind, name, depth):
    """(a function that makes one training step of the kind on random data, its FLOPs per image)."""
    device = torch.device("cuda" if CUDA else "cpu")
    train.LAYER_PAIRS, train.ALIGN_DEPTH = LAYER_PAIRS, ALIGN_DEPTH
    torch.manual_seed(0)
    model = build(name, depth=depth, align_depth=ALIGN_DEPTH, teacher_dim=None if kind == "plain" else 768).to(device)
    teacher, align = None, train.alignment_losses
    if kind == "phase I":
        network = timm.create_model(TEACHER, pretrained=False, num_classes=0)
        teacher = Teacher(network, [layer for _, layer in LAYER_PAIRS], model.grid * 14).to(device)
    text = name.startswith("MMDiT")
    flops = flops_per_image(model, teacher, TABLE if text else None)
    if COMPILE:
        for part in (*model.blocks, model.final_layer, *([] if teacher is None else [teacher])):
            part.compile(fullgraph=True, dynamic=False)
        align = torch.compile(align, fullgraph=True, dynamic=False)
    if kind == "phase II":
        model.projectors = None
    y = torch.randint(0, 1000, (BATCH_SIZE,), device=device)
    context = torch.randn(BATCH_SIZE, 77, 768, device=device) if text else y
    return step_of(model, teacher, align, y, lambda _: context), flops


def timed(function):
    started = time.perf_counter()
    function()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_memory(result, *arguments):
    """GiB at most in use by a process that makes two steps of this kind alone."""
    step, _ = make_step(*arguments)
    step(), step()
    peak = torch.cuda.max_memory_allocated() if CUDA else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result.put(peak / 2**30)


def photograph(rng, width, height):
    """RGB image with the spectrum of a photograph (amplitude falls as frequency^-1.5) and fine noise."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    spectra = rng.normal(size=(4, *frequency.shape)) + 1j * rng.normal(size=(4, *frequency.shape))
    shades = [np.fft.irfft2(spectrum / frequency**1.5, (height, width)) for spectrum in spectra]
    shades = [shade / shade.std() for shade in shades]
    pixels = np.stack([128 + 50 * (0.85 * shades[0] + 0.4 * shade) for shade in shades[1:]], axis=-1)
    return Image.fromarray((pixels + rng.normal(size=pixels.shape) * 4).clip(0, 255).astype(np.uint8))


def write_prepared(folder, packed, latents):
    """A finished data set whose images repeat the packed ones."""
    folder.mkdir()
    count = len(latents)
    np.save(folder / "latents.npy", latents)
    whole, part = divmod(count, len(packed))
    with open(folder / "images.bin", "wb") as file:
        for _ in range(whole):
            file.write(b"".join(packed))
        file.write(b"".join(packed[:part]))
    lengths = np.resize([len(image) for image in packed], count)
    np.save(folder / "image_offsets.npy", np.concatenate([[0], np.cumsum(lengths)]))
    np.save(folder / "labels.npy", np.arange(count) % 1000)
    meta = dict(format=FORMAT, image_size=Image.open(io.BytesIO(packed[0])).width, latent_shape=latents.shape[1:],
                vae=dict(name="", scale=1), classes=[str(i) for i in range(1000)],
                bytes={file.name: file.stat().st_size for file in folder.iterdir()})
    (folder / "meta.json").write_text(json.dumps(meta))


def loader_rate(folder, with_images, batches):
    """Images/s of train.py's loader with one worker, whose first batches do not count."""
    data = PreparedDataset(folder, with_images)
    train.BATCH_SIZE, train.WORKERS = 256, 1
    loader = train.open_batches(data, range(batches + 5), 0, 1, torch.device("cpu"))
    for _ in range(5):
        next(loader)
    return train.BATCH_SIZE * batches / timed(lambda: [next(loader) for _ in range(batches)])


def attention_step(kind):
    """A function that makes the loss of queries and keys at 1,024 tokens, and their gradients."""
    device, dtype = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
    torch.manual_seed(0)
    shape = 4, TEXT_BATCH_SIZE, 12, 1024, 64
    q, k = (torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(2))
    teacher = list(zip(*torch.randn(2, *shape, device=device, dtype=dtype)))
    if kind == "pieces":
        return lambda: attention_loss_of_qk(list(zip(q, k)), teacher).backward()
    if kind == "at once":
        return lambda: attention_loss([attention_logits(*pair) for pair in zip(q, k)],
                                      [attention_logits(*pair) for pair in teacher]).backward()
    return lambda: (q.sum() + k.sum()).backward()  # gradients alone


def attention_memory(result, kind):
    attention_step(kind)()
    peak = torch.cuda.max_memory_allocated() if CUDA else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result.put(peak / 2**30)


def bench_attention():
    context, peaks = multiprocessing.get_context("spawn"), {}
    for kind in ("nothing", "at once", "pieces"):
        result = context.Queue()
        process = context.Process(target=attention_memory, args=(result, kind))
        process.start()
        peaks[kind] = result.get()
        process.join()
    steps = {kind: attention_step(kind) for kind in ("at once", "pieces")}
    rounds = [{kind: timed(step) for kind, step in steps.items()} for _ in range(WARMUP + ROUNDS)][WARMUP:]
    saved = {kind: peaks[kind] - peaks["nothing"] for kind in steps}
    for kind in steps:
        print(f"{kind}: {1000 * statistics.median(each[kind] for each in rounds):.0f} ms, "
              f"{saved[kind]:.2f} GiB for {TEXT_BATCH_SIZE} images")
    print(f"pieces by at once: time {statistics.median(each['pieces'] / each['at once'] for each in rounds):.2f}, "
          f"memory {saved['pieces'] / saved['at once']:.2f}")


def bench_data():
    torch.set_num_threads(1)
    rng, folder = np.random.default_rng(0), Path(tempfile.mkdtemp())
    (folder / "tree/class").mkdir(parents=True)
    for i in range(100):
        width, height = [(500, 375), (375, 500), (500, 333), (640, 480), (1024, 768)][i % 5]
        photograph(rng, width, height).save(folder / f"tree/class/{i:03d}.jpg", quality=92)
    files = sorted((folder / "tree/class").iterdir())
    crops = Crops(ImageFiles(folder / "tree"), IMAGE_SIZE, None)
    print(f"{len(files)} JPEGs of {sum(file.stat().st_size for file in files) / len(files) / 1e3:.0f} kB on average")

    def bare(size_of):
        for file in files:
            image = Image.open(file).convert("RGB")
            image.resize(size_of(image), Image.BICUBIC)

    square = lambda image: (IMAGE_SIZE, IMAGE_SIZE)
    short_edge = lambda image: tuple(round(edge * IMAGE_SIZE / min(image.size)) for edge in image.size)
    rounds = [(timed(lambda: crops[range(len(files))]), timed(lambda: bare(short_edge)), timed(lambda: bare(square)))
              for _ in range(7)]
    ours, to_edge, to_square = (statistics.median(times) / len(files) * 1000 for times in zip(*rounds))
    by_edge, by_square = (statistics.median(row[0] / row[i] for row in rounds) for i in (1, 2))
    print(f"decode, crop, pack     {1000 / ours:10.0f} images/s on one core, {ours:.2f} ms each; Pillow's decode and "
          f"resize to a short edge of {IMAGE_SIZE} {to_edge:.2f} ms ({by_edge:.2f} times), to a square "
          f"{to_square:.2f} ms ({by_square:.2f} times)")

    _, packed, _ = crops[range(len(files))]
    latents = np.resize(rng.normal(size=(500, 8, 32, 32)).astype(np.float16), (20_000, 8, 32, 32))
    write_prepared(folder / "prepared", packed, latents)
    data = PreparedDataset(folder / "prepared")

    def decode_rate(use):
        """Images/s of Pillow alone in this process, on files as far apart in memory as the loader's."""
        spans = [data.offsets[row : row + 2] for row in rng.permutation(len(data))[:500]]
        return 500 / timed(lambda: [use(Image.open(io.BytesIO(data.packed[a:b]))) for a, b in spans])

    loader_rate(folder / "prepared", False, 70)  # warms the page cache
    unread = statistics.median(loader_rate(folder / "prepared", False, 200) for _ in range(3))
    print(f"loader, phase II       {unread:10.0f} images/s with one worker, {IMAGE_SIZE} x {IMAGE_SIZE}")
    rounds = [(loader_rate(data.path, True, 8), decode_rate(np.asarray), decode_rate(lambda x: x.load()))
              for _ in range(7)]
    loaded, as_arrays, decoded = (statistics.median(rates) for rates in zip(*rounds))
    print(f"loader, phase I        {loaded:10.0f} images/s with one worker; Pillow decodes the same files to arrays at "
          f"{as_arrays:.0f} (this is {statistics.median(a / b for a, b, _ in rounds):.0%} of it), decodes only at "
          f"{decoded:.0f} ({statistics.median(a / c for a, _, c in rounds):.0%})")

    tiny = io.BytesIO()
    Image.new("RGB", (8, 8)).save(tiny, "WEBP", lossless=True)
    write_prepared(folder / "large", [tiny.getvalue()], np.zeros((1_281_167, 8, 1, 1), np.float16))
    opening = timed(lambda: PreparedDataset(folder / "large"))
    permuting = timed(lambda: train.permutation(0, 0, 1_281_167))
    print(f"1,281,167 entries      opened in {opening:.3f} s; an epoch's order in {permuting:.3f} s and "
          f"{train.permutation(0, 0, 1_281_167).nbytes / 2**20:.0f} MiB")

    if CUDA:
        device = torch.device("cuda")
        torch.set_float32_matmul_precision("high")
        pixels = torch.randint(0, 256, (prepare_latents.BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
        vae = AutoencoderKL().eval().to(device, memory_format=torch.channels_last)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vae.encode(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, device=device))
        vae.encode = torch.compile(vae.encode)
        for prepare_latents.VAE_PRECISION in ("float32", "bf16"):
            for _ in range(3):
                encode(pixels, vae, device)
            rate = 20 * len(pixels) / timed(lambda: [encode(pixels, vae, device) for _ in range(20)])
            print(f"VAE encoder, {prepare_latents.VAE_PRECISION:10}{rate:10.0f} images/s; "
                  f"{rate * counter.get_total_flops() / matrix_rate(device, torch.bfloat16):.0%} of the measured "
                  "bf16 matrix rate")


def bench_steps(model=MODEL, depth=MODELS[MODEL]["depth"]):
    spawn = multiprocessing.get_context("spawn")
    memory = {}
    for kind in KINDS:
        result = spawn.Queue()
        process = spawn.Process(target=peak_memory, args=(result, kind, model, depth))
        process.start()
        memory[kind] = result.get()
        process.join()

    if CUDA:
        torch.set_float32_matmul_precision("high")
    steps = {kind: make_step(kind, model, depth) for kind in KINDS}
    times = {kind: [] for kind in KINDS}
    for _ in range(WARMUP + ROUNDS):
        for kind, (step, _) in steps.items():
            times[kind].append(timed(step))
    rate = matrix_rate(torch.device("cuda" if CUDA else "cpu"), torch.bfloat16 if CUDA else torch.float32)
    name = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    print(f"{model}, {depth} blocks, batch {BATCH_SIZE}, {'bf16' if CUDA else 'float32'}"
          f"{', compiled' if COMPILE else ''}, torch {torch.__version__}, {name}; measured matrix rate "
          f"{rate / 1e12:.2f} TFLOP/s")
    print(f"{'':12}{'ms / step':>10}{'images/s':>10}{'/ plain':>9}{'MFU':>7}{'peak GiB':>10}")
    for kind in KINDS:
        counted = times[kind][WARMUP:]
        median = statistics.median(counted)
        # ratios pair the steps of one round, so that a slow moment of the machine hits both sides
        ratio = statistics.median(a / b for a, b in zip(counted, times["plain"][WARMUP:]))
        print(f"{kind:12}{median * 1000:>10.1f}{BATCH_SIZE / median:>10.1f}{ratio:>9.3f}"
              f"{steps[kind][1] * BATCH_SIZE / median / rate:>7.1%}{memory[kind]:>10.2f}")


def bench_text():
    import transformers
    bench_steps("MMDiT/2", MODELS["MMDiT/2"]["depth"] if CUDA else 6)
    from tokenizers import Tokenizer, models
    device, captions = torch.device("cuda" if CUDA else "cpu"), ["a", "b", "c"]
    with tempfile.TemporaryDirectory() as folder:  # of CLIP ViT-L/14's size
        transformers.CLIPTextModel(transformers.CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            projection_dim=768)).save_pretrained(folder)
        words = Tokenizer(models.WordLevel({"": 0, "a": 1, "b": 2, "c": 3}, unk_token=""))
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=77,
                                             pad_token="").save_pretrained(folder)
        encoder = TextEncoder(folder).to(device, torch.bfloat16 if CUDA else torch.float32)
    contexts = {"table": CaptionTable(encoder, captions),
                "encoded at each step": CaptionTable(encoder, captions, gib=0)}
    model = build("MMDiT/2", teacher_dim=None).to(device)
    flops = [flops_per_image(model, None, context) for context in contexts.values()]
    if COMPILE:
        for part in (*model.blocks, model.final_layer):
            part.compile(fullgraph=True, dynamic=False)
    y = torch.arange(TEXT_BATCH_SIZE, device=device) % 3
    step = step_of(model, None, train.alignment_losses, y, contexts["table"])
    rounds = [[*(timed(partial(step, context)) for context in contexts.values()),
               timed(lambda: contexts["encoded at each step"](y))] for _ in range(WARMUP + ROUNDS)][WARMUP:]
    ratios = sorted(b / a for a, b, _ in rounds)
    print(f"MMDiT/2, batch {TEXT_BATCH_SIZE}, phase II: a step that encodes its captions, by one that reads them from "
          f"the table: {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}); encoding alone takes "
          f"{statistics.median(c / a for a, _, c in rounds):.3f} of the latter; by operations "
          f"{flops[1] / flops[0]:.3f}, {flops[0] / 1e9:.0f} GFLOP per image with the table")


def bench_fid():
    from pytorch_fid import inception as judge
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(count, 2048, generator=generator) for count in (10_000, 50_000))
    seconds = timed(lambda: fid.precision_recall(real, fake))
    print(f"precision and recall of 50,000 against 10,000: {seconds:.0f} s, "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB at most")

    device = torch.device("cuda" if CUDA else "cpu")
    ours = InceptionV3("bilinear").to(device)
    judge.load_state_dict_from_url = lambda *_, **__: ours.state_dict()  # in place of its download
    theirs = judge.InceptionV3().eval().to(device)
    images = torch.randint(0, 256, (50, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, device=device)
    with torch.no_grad():
        pairs = [(timed(lambda: theirs(images / 255)), timed(lambda: ours(images))) for _ in range(1 + 5)][1:]
    print(f"features: {len(images) / statistics.median(b for _, b in pairs):.1f} images/s, "
          f"{statistics.median(a / b for a, b in pairs):.2f} times pytorch-fid's rate")


def bench_checkpoint():
    rank, world, device = start_processes(nccl=True)
    for name in ("SiT-B/2", "SiT-XL/2"):
        model = build(name, teacher_dim=None).to(device)
        if world > 1:
            train.shard(model, device, world, world, torch.float32)
        optimizer = train.make_optimizer(model)
        ema = {key: p.detach().clone() for key, p in model.named_parameters()}
        state = checkpoint.run_state(model, optimizer, ema, torch.zeros(8, device=device))
        folders = [tempfile.mkdtemp() if rank == 0 else None]
        if world > 1:
            torch.distributed.broadcast_object_list(folders)
        run, seconds = Path(folders[0]), []
        for step in (1, 2, 3):
            seconds.append(timed(partial(checkpoint.save, run, {}, dict(step=step), state, ema, 1, 0)))
        if rank == 0:
            size = sum(file.stat().st_size for file in (run / "checkpoints/step_0000003").iterdir())
            print(f"{name}, {world} processes: {size / 1e9:.1f} GB in {', '.join(f'{each:.1f}' for each in seconds)} s")
            shutil.rmtree(run)


if __name__ == "__main__":
    parts = {"text": bench_text, "attention": bench_attention, "data": bench_data, "fid": bench_fid,
             "checkpoint": bench_checkpoint}
    parts.get(sys.argv[1] if sys.argv[1:] else "", bench_steps)()
