"""SiT, the scalable interpolant transformer (arXiv 2401.08740), with attention that can be returned.

    model = build("SiT-XL/2")
    velocity, attn_logits, features = model(x, t, y, attn_layers=(4, 5, 6, 7), return_features=True)

Every block runs the fused `scaled_dot_product_attention`. One named in `attn_layers` hands out its queries and keys as
well, from which the logits are computed: no other block has any. Parameter names and shapes are those of the
published SiT, REPA and HASTE checkpoints.
"""

import json
import math
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

SIZES = {  # name: depth, hidden size, heads
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
MODELS = {
    f"SiT-{size}/{patch}": dict(depth=depth, hidden_size=hidden, num_heads=heads, patch_size=patch)
    for size, (depth, hidden, heads) in SIZES.items()
    for patch in (2, 4, 8)
}
# the demo's, for a CPU
MODELS["SiT-T/4"] = dict(depth=6, hidden_size=128, num_heads=4, patch_size=4, align_depth=3, projector_dim=256)


class PatchEmbed(nn.Module):
    """Cuts [B, C, H, W] into patches and projects each: [B, N, D], row by row."""

    def __init__(self, patch_size, in_channels, hidden_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Embeds times t [B] in 0..1 into [B, D]: sinusoids (cosine half first, as in GLIDE), then an MLP."""

    def __init__(self, hidden_size, frequency_dim=256):
        super().__init__()
        self.frequency_dim = frequency_dim
        self.mlp = nn.Sequential(nn.Linear(frequency_dim, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t):
        half = self.frequency_dim // 2
        frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
        angles = t.float()[:, None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(t.dtype))


class LabelEmbedder(nn.Module):
    """Embeds class ids y [B] into [B, D]. With a dropout probability the table has one more row, "no label".

    Dropping labels is the training loop's business: its draws are seeded by step, so that a resumed run repeats them.
    """

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def forward(self, y):
        return self.embedding_table(y)


def attention_logits(q, k):
    """q k^T / sqrt(head dim), [B, heads, N, M], of queries [B, heads, N, head dim] and keys [B, heads, M, head dim]."""
    return (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)


class Attention(nn.Module):
    """Multi-head self-attention; with `return_qk` also its (queries, keys), each [B, heads, N, head dim]."""

    def __init__(self, hidden_size, num_heads, qk_norm):
        super().__init__()
        self.num_heads = num_heads
        head_dim = hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x, return_qk=False):
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, N, head dim]
        q, k = self.q_norm(q), self.k_norm(k)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(B, N, D)), (q, k) if return_qk else None


class Mlp(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, hidden_size, mlp_hidden_size):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_hidden_size)
        self.fc2 = nn.Linear(mlp_hidden_size, hidden_size)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x, shift, scale):
    """Adaptive layer norm's second half: x [B, N, D], shift and scale [B, D]."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    """Transformer block with adaLN-Zero conditioning (DiT, arXiv 2212.09748)."""

    def __init__(self, hidden_size, num_heads, mlp_ratio, qk_norm):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, qk_norm)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, condition, return_qk=False):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=-1)
        attended, qk = self.attn(modulate(self.norm1(x), shift1, scale1), return_qk)
        x = x + gate1.unsqueeze(1) * attended
        x = x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x, qk


class FinalLayer(nn.Module):
    """Tokens [B, N, D] to patches [B, N, patch * patch * channels]."""

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, condition):
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def sincos_pos_embed(hidden_size, grid):
    """Fixed 2-D sine-cosine position table [1, grid * grid, D] of MAE: first half by column, second half by row."""
    omega = 10_000 ** -(torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size / 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid, D / 2]
    by_column = line[None, :, :].expand(grid, grid, -1)
    by_row = line[:, None, :].expand(grid, grid, -1)
    return torch.cat([by_column, by_row], dim=-1).reshape(1, grid * grid, hidden_size).float()


def initialize_linear(module):
    """Xavier weights and zero bias, for Module.apply: other modules are left alone."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class SiT(nn.Module):
    """Diffusion transformer that predicts the velocity of an interpolant between data (t = 0) and noise (t = 1).

    align_depth: `features` are the tokens after this many blocks, through the projector (REPA, arXiv 2410.06940).
    teacher_dim: width of the projector's output; None builds no projector.
    learn_sigma: the original SiT checkpoints' shapes, 2C output channels of which the first C are the velocity.
    """

    def __init__(self, *, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, num_classes=1000, class_dropout_prob=0.1, qk_norm=False, learn_sigma=False,
                 align_depth=8, teacher_dim=768, projector_dim=2048):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"input_size {input_size} is no multiple of patch_size {patch_size}; "
                             f"choose a model whose patch divides it")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden_size {hidden_size} must be a multiple of num_heads {num_heads} and of 4")
        if teacher_dim is not None and not 1 <= align_depth <= depth:
            raise ValueError(f"align_depth {align_depth} is not one of the model's blocks 1..{depth}")
        self.input_size, self.patch_size, self.grid = input_size, patch_size, input_size // patch_size
        self.in_channels, self.out_channels = in_channels, in_channels * (2 if learn_sigma else 1)
        self.num_classes, self.align_depth, self.teacher_dim = num_classes, align_depth, teacher_dim
        self.activation_checkpointing = False  # True: recompute each block in the backward pass, to save memory

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid**2, hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()
        self.projectors = None
        if teacher_dim is not None:  # last, so that a seed makes the same student with and without it
            projector = nn.Sequential(nn.Linear(hidden_size, projector_dim), nn.SiLU(),
                                      nn.Linear(projector_dim, projector_dim), nn.SiLU(),
                                      nn.Linear(projector_dim, teacher_dim))
            projector.apply(initialize_linear)
            self.projectors = nn.ModuleList([projector])  # a list of one: the published keys are projectors.0.*

    def initialize_weights(self):
        """DiT's initialisation: Xavier for linear layers, zero where a block or the output must start as nothing."""
        self.apply(initialize_linear)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.x_embedder.proj.weight.shape[0], -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for layer in [block.adaLN_modulation[1] for block in self.blocks] + [self.final_layer.adaLN_modulation[1],
                                                                             self.final_layer.linear]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.pos_embed.copy_(sincos_pos_embed(self.pos_embed.shape[-1], self.grid))

    def unpatchify(self, x):
        """[B, N, patch * patch * C] to [B, C, H, W]."""
        g, p, c = self.grid, self.patch_size, self.out_channels
        x = x.reshape(-1, g, g, p, p, c).permute(0, 5, 1, 3, 2, 4)  # [B, C, rows, patch, columns, patch]
        return x.reshape(-1, c, g * p, g * p)

    def forward(self, x, t, y, attn_layers=(), return_features=False, return_qk=False):
        """Velocity at x_t, and on request what the alignment losses need.

        x [B, C, H, W]; t [B] in 0..1; y [B] int64 class ids, num_classes meaning "no label".
        Returns velocity [B, C, H, W]; attn_logits, a list of [B, heads, N, N] scaled and pre-softmax, one for each
        0-based block in attn_layers; features [B, N, teacher_dim], or None unless return_features. With return_qk
        each block's (queries, keys), [B, heads, N, head dim], stand in place of the logits that attention_logits makes
        of them, so that a loss can compute only those that it needs and need not keep them.
        """
        if x.shape[1:] != (self.in_channels, self.input_size, self.input_size):
            raise ValueError(f"x is {list(x.shape)}; this model takes "
                             f"[B, {self.in_channels}, {self.input_size}, {self.input_size}]")
        if any(not 0 <= layer < len(self.blocks) for layer in attn_layers):
            raise ValueError(f"attn_layers {list(attn_layers)} must lie in 0..{len(self.blocks) - 1}")
        if return_features and self.projectors is None:
            raise ValueError("return_features needs a projector; build the model with teacher_dim set")

        x = self.x_embedder(x) + self.pos_embed  # [B, N, D]
        condition = self.t_embedder(t) + self.y_embedder(y)  # [B, D]
        qk, features = {}, None
        for i, block in enumerate(self.blocks):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, block_qk = checkpoint(block, x, condition, i in attn_layers, use_reentrant=False)
            else:
                x, block_qk = block(x, condition, i in attn_layers)
            if i in attn_layers:
                qk[i] = block_qk
            if return_features and i + 1 == self.align_depth:
                features = self.projectors[0](x)
        velocity = self.unpatchify(self.final_layer(x, condition))
        if self.out_channels > self.in_channels:  # learn_sigma
            velocity = velocity[:, : self.in_channels]
        return velocity, [qk[i] if return_qk else attention_logits(*qk[i]) for i in attn_layers], features


def build(name, **overrides):
    """The SiT called `name` ("SiT-XL/2", see MODELS), with any of SiT's arguments overridden."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; choose one of {', '.join(MODELS)}")
    return SiT(**{**MODELS[name], **overrides})


# ----- training at scale: speed, shards, checkpoints ------------------------------------------------------------------


def flops_per_image(model, teacher):
    """FLOPs of a training step per image; MFU = flops_per_image * images/s / (FLOP/s of all GPUs together).

    The products of L transformer blocks of width D on N tokens: L (24 N D^2 + 4 N^2 D), for the student three times
    (its backward pass makes two), for the frozen teacher once. What is recomputed does not count, nor do embedders,
    projector and alignment losses: 2 % in phase I of SiT-XL/2.
    """
    def forward(depth, N, D):
        return depth * (24 * N * D**2 + 4 * N**2 * D)

    _, N, D = model.pos_embed.shape
    flops = 3 * forward(len(model.blocks), N, D)
    if teacher is not None:
        flops += forward(len(teacher.network.blocks), N + teacher.network.num_prefix_tokens, teacher.dim)
    return flops


def matrix_rate(device, dtype):
    """FLOP/s of a large matrix product in this process, the best of ten."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, dtype=dtype, device=device)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for it
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / min(seconds)


def peak_gib(device):
    """Memory used at most so far, in GiB: the GPU's since the phase began, or the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def compile_blocks(model, dynamic):
    """Compiles a SiT block by block: one compilation serves all of them, and FSDP gathers their weights between them."""
    for part in (*model.blocks, model.final_layer):
        part.forward = torch.compile(part.forward, fullgraph=True, dynamic=dynamic)


def shard(model, device, replicas, shards, dtype, gather_again):
    """Spreads a SiT over replicas * shards processes (FSDP2), each block by itself, gathered in `dtype` for its use.

    Each group of `shards` neighbouring ranks holds the weights once. Weights and reduced gradients are float32.
    gather_again: free a block's weights after forward and gather them again for backward.
    """
    mesh = init_device_mesh(device.type, (replicas, shards), mesh_dim_names=("replicate", "shard"))
    mesh = mesh if replicas > 1 else mesh["shard"]
    # Under autocast the residual stream and what lies outside the blocks stay float32, as on one device.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in (*model.blocks, *(model.projectors or ())):
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=gather_again)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False),
                reshard_after_forward=gather_again)


def drop_projector(model, optimizer):
    """Removes the projector from the model and its weights from the optimiser, whose state of the others stays."""
    model.projectors = None
    group = optimizer.param_groups[0]
    group["params"] = [p for p in model.parameters() if p.requires_grad]
    for p in optimizer.state.keys() - set(group["params"]):
        del optimizer.state[p]


def ema_parameters(model):
    """The parameters that are averaged: all but the projector, which sampling does not need."""
    return {name: p for name, p in model.named_parameters() if not name.startswith("projectors.")}


def run_state(model, optimizer, ema):
    """Every tensor of the run by name, not copied: what a checkpoint is written from and read into."""
    weights = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    moments = {f"optimizer.{name}.{key}": value for name, p in model.named_parameters() if p.requires_grad
               for key, value in optimizer.state[p].items()}
    return {**weights, **moments, **{f"ema.{name}": value for name, value in ema.items()}}


def whole(tensor):
    """The tensor itself, or put together from its shards; every rank takes part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_ema(ema, rank):
    """A copy of the EMA in rank 0's host memory; {} elsewhere. Every rank takes part."""
    averages = ((name, whole(average)) for name, average in ema.items())
    return {name: average.to("cpu", copy=True) for name, average in averages if rank == 0}


def finished_checkpoints(run):
    """Folders of whole checkpoints, oldest first."""
    return sorted((run / "checkpoints").glob("step_" + "[0-9]" * 7))


def save_checkpoint(run, settings, progress, tensors, ema, group, keep_last, keep_every):
    """Copies the tensors, and writes checkpoints/step_N while training goes on; returns a future.

    Every rank writes its shards of `tensors` (torch.distributed.checkpoint over the process group), rank 0 the rest and
    `ema`, which it alone has. The folder gets its name when all is there; then old ones go. Where writing fails the
    future raises OSError, and what stood before stands. keep_every: of these steps, checkpoints stay; 0: none.
    """
    folder = run / "checkpoints" / f"step_{progress['step']:07d}"
    unfinished = folder.with_suffix(".tmp")
    writing = dcp.async_save(tensors, checkpoint_id=unfinished, process_group=group, no_dist=group is None)

    def finish():
        try:
            writing.result()
            if ema:
                save_file(ema, unfinished / "ema.safetensors", metadata=dict(settings=json.dumps(settings)))
                (unfinished / "progress.json").write_text(json.dumps(dict(progress, settings=settings)))
                os.replace(unfinished, folder)
                for old in finished_checkpoints(run)[:-keep_last]:
                    if not keep_every or int(old.name.removeprefix("step_")) % keep_every:
                        shutil.rmtree(old)
                latest = shutil.copyfile(folder / "ema.safetensors", run / "ema.safetensors.tmp")
                os.replace(latest, run / "ema.safetensors")
        except (OSError, CheckpointException, SafetensorError) as error:
            if ema:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise OSError(str(error).strip().splitlines()[-1]) from error

    return ThreadPoolExecutor(1).submit(finish)


def load_checkpoint(folder, tensors, world):
    """Reads the checkpoint into the tensors, whatever number of processes wrote it. Raises ValueError if damaged."""
    try:
        dcp.load(tensors, checkpoint_id=folder, no_dist=world == 1)
    except (CheckpointException, Exception) as error:  # of many kinds: a file may be cut anywhere
        raise damaged(folder, error) from error


def damaged(folder, error):
    """The ValueError for a checkpoint that cannot be read."""
    return ValueError(f"{folder}: damaged checkpoint ({type(error).__name__}: {str(error).strip().splitlines()[-1]}); "
                      f"delete it to resume from the one before, if there is one")
