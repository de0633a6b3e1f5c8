"""What a run costs: its operations, its memory and the rate of the device, and the line that says so at its start."""

import timeit

import torch
from torch.nn.attention import SDPBackend

from model import JiT


def tokens_per_block(model, captions):
    """How many tokens pass through each block: the image's, REG's class token, a caption's, JiT's of the class."""
    always = model.pos_embed.shape[1] + (captions.ids.shape[1] if captions else 0)
    return [always + model.in_context_len * (i >= model.in_context_start) for i in range(len(model.blocks))]


def flops_per_image(model, teacher, captions=None):
    """FLOPs of a training step per image; MFU = flops_per_image * images/s / (FLOP/s of all GPUs together).

    The products of L blocks of width D on N tokens, L (24 N D^2 + 4 N^2 D): the student's three times (its backward
    pass makes two), the frozen networks' once. Not what is recomputed, embedders, projector, losses (2 % of XL/2's).
    """
    D = model.pos_embed.shape[2]
    blocks = [(3, N, D) for N in tokens_per_block(model, captions)]
    if teacher is not None:
        tokens = model.grid**2 + teacher.network.num_prefix_tokens
        blocks.append((len(teacher.network.blocks), tokens, teacher.dim))
    encoding = captions.cost()[1] if captions else 0
    return encoding + sum(L * (24 * N * D**2 + 4 * N**2 * D) for L, N, D in blocks)


def check_memory(model, teacher, captions, share, parts, shards, precision, device, noise=0):
    """Bytes that a process needs at most for its share of a batch in `parts` micro-batches, estimated:
    PyTorch allocated 0.99 to 1.09 of them.

    Each weight has 4 bytes, 8 of AdamW, 4 of the EMA, and whole once more its copy for the products
    and, of several MICRO_BATCHES, the gradient so far. The backward pass keeps 37 bytes of each
    value of each block's tokens, JiT's 48; in phase I both attentions, two layers of the projector
    and the features too. noise: bytes that a step draws. Raises ValueError if the GPU has less, with
    the MICRO_BATCHES that fit.
    """
    weights = sum(p.numel() for p in model.parameters())
    fixed = noise + weights * (16 / shards + precision.itemsize) + (captions.cost()[0] if captions else 0)
    if teacher is not None:
        fixed += 4 * sum(p.numel() for p in teacher.parameters())
    of_an_image = bytes_of_an_image(model, teacher, captions, precision)

    def needed(parts):
        return fixed + 4 * weights * (parts > 1) + share // parts * of_an_image

    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info()
        free = min(free + torch.cuda.memory_reserved(), whole)  # nobody's, or ours
        if needed(parts) > free:
            fitting = [more for more in range(1, share + 1) if share % more == 0 and needed(more) < free]
            remedy = fitting[0] if fitting else f"{share} and ACTIVATION_CHECKPOINTING to True"
            raise ValueError(f"MICRO_BATCHES {parts}: about {needed(parts) / 2**30:.0f} GiB "
                             f"needed, {free / 2**30:.0f} free on this GPU; set it to {remedy}")
    return needed(parts)


def bytes_of_an_image(model, teacher, captions, precision):
    """What the backward pass keeps of an image."""
    N, D = model.grid**2, model.pos_embed.shape[2]
    if model.activation_checkpointing:
        of_a_value = 5.5
    elif precision == torch.bfloat16:
        of_a_value = 48 if isinstance(model, JiT) else 37
    else:
        of_a_value = 80
    kept = of_a_value * sum(tokens_per_block(model, captions)) * D
    if teacher is not None:
        heads = min(model.num_heads, teacher.network.blocks[0].attn.num_heads)
        pairs, rows = (len(teacher.layers), N) if N <= 256 else (1, 256)  # see losses.attention_loss_of_qk
        kept += 8 * pairs * heads * rows * N
        if model.projectors is not None:
            kept += N * (16 * 2048 + 20 * teacher.dim)
    return kept


def matrix_rate(device, dtype):
    """FLOP/s of a large matrix product in this process, the best of ten."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, dtype=dtype, device=device)
    return 2 * n**3 / min(timeit.repeat(lambda: (a @ b)[0, 0].item(), number=1, repeat=10))  # item() waits for it


def attention_kernel(model, dtype, device):
    """Name of the fused attention's kernel that PyTorch will choose."""
    _, N, D = model.pos_embed.shape
    q = torch.empty(1, model.num_heads, N, D // model.num_heads, dtype=dtype, device=device)
    return SDPBackend(torch._fused_sdp_choice(q, q, q)).name.lower()


def estimate(memory, flops, peak_rate, batch_size):
    """The line that says what a run will cost: bytes of a process, FLOPs of an image, FLOP/s of all GPUs together."""
    hours = 1000 * batch_size * flops / (peak_rate / 2) / 3600
    return (f"estimate: about {memory / 2**30:.3g} GiB per process; {flops / 1e9:.3g} GFLOP per image, so at half of "
            f"the measured {peak_rate / 1e12:.3g} TFLOP/s 1,000 steps take {hours:.2g} hours")


def peak_gib(device):
    """Memory used at most so far, in GiB: the GPU's since the phase began, or the process's; NaN on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
