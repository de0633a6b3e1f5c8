"""SiT, the scalable interpolant transformer (arXiv 2401.08740), MMDiT, for text (arXiv 2403.03206), and JiT, for pixels
(arXiv 2511.13720), with attention that can be returned; and the interpolant between data (t = 0) and noise (t = 1).

    model = build("SiT-XL/2")
    velocity, attn_logits, features = model(x, t, y, attn_layers=(4, 5, 6, 7), return_features=True)

Every block runs the fused `scaled_dot_product_attention`. One named in `attn_layers` hands out its queries and keys as
well, from which the logits are computed. Parameter names and shapes are those of the published checkpoints.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# depth, hidden size, heads
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
MODELS = {
    f"SiT-{size}/{patch}": dict(depth=depth, hidden_size=hidden, num_heads=heads, patch_size=patch)
    for size, (depth, hidden, heads) in SIZES.items()
    for patch in (1, 2, 4, 8)
}
MODELS["MMDiT/2"] = dict(depth=24, hidden_size=768, num_heads=24, patch_size=2, context_dim=768)
for patch in (16, 32):
    MODELS[f"JiT-B/{patch}"] = dict(depth=12, hidden_size=768, num_heads=12, patch_size=patch, bottleneck_dim=128)
    MODELS[f"JiT-L/{patch}"] = dict(depth=24, hidden_size=1024, num_heads=16, patch_size=patch, bottleneck_dim=128,
                                    in_context_start=8)
    MODELS[f"JiT-H/{patch}"] = dict(depth=32, hidden_size=1280, num_heads=16, patch_size=patch, bottleneck_dim=256,
                                    in_context_start=10, dropout=0.2)
# small ones, for a CPU
MODELS["SiT-T/4"] = dict(depth=6, hidden_size=128, num_heads=4, patch_size=4, align_depth=3, projector_dim=256)
MODELS["MMDiT-T/4"] = dict(depth=6, hidden_size=192, num_heads=6, patch_size=4, context_dim=384, align_depth=3,
                           projector_dim=384)
MODELS["JiT-T/4"] = dict(depth=6, hidden_size=128, num_heads=4, patch_size=4, bottleneck_dim=32, in_context_len=4,
                         in_context_start=2, align_depth=3, projector_dim=256)


class PatchEmbed(nn.Module):
    """Cuts [B, C, H, W] into patches and projects each, JiT's by way of few channels: [B, N, D], row by row."""

    def __init__(self, patch_size, in_channels, hidden_size, bottleneck_dim=None):
        super().__init__()
        if bottleneck_dim is None:
            self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        else:
            self.proj1 = nn.Conv2d(in_channels, bottleneck_dim, kernel_size=patch_size, stride=patch_size, bias=False)
            self.proj2 = nn.Conv2d(bottleneck_dim, hidden_size, kernel_size=1)

    def forward(self, x):
        for convolution in self.children():
            x = convolution(x)
        return x.flatten(2).transpose(1, 2)


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
        with torch.autocast(t.device.type, enabled=False):  # bf16 would round by most of a sampler's step
            return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(t.dtype))


class LabelEmbedder(nn.Module):
    """Embeds class ids y [B] into [B, D]. With a dropout probability the table has one more row, "no label"; to
    drop labels to it is the caller's task, as in train.py."""

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def forward(self, y):
        return self.embedding_table(y)


class RMSNorm(nn.RMSNorm):
    """Root mean square norm with learned weights, in float32; its eps is JiT's."""

    def forward(self, x):
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), eps=1e-6).to(x.dtype)


def attention_logits(q, k):
    """q k^T / sqrt(head dim), [B, heads, N, M], of queries [B, heads, N, head dim] and keys [B,
    heads, M, head dim]; of those in bf16 the products are float32 all the same."""
    q, k = (each.float() if each.dtype == torch.bfloat16 else each for each in (q, k))
    with torch.autocast(q.device.type, enabled=False):
        return (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)


class Attention(nn.Module):
    """Multi-head self-attention, in the two halves between which MMDiT's tokens of image and text attend together."""

    def __init__(self, hidden_size, num_heads, qk_norm):
        super().__init__()
        self.num_heads = num_heads
        head_dim = hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def heads(self, x):
        """Queries, keys and values of tokens x [B, N, D], each [B, heads, N, head dim]."""
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def merge(self, out):
        """What the heads attended to, [B, heads, N, head dim], to [B, N, D]."""
        return self.proj(out.transpose(1, 2).flatten(2))


class RotaryAttention(Attention):
    """Attention whose queries and keys are normed, then turned by their token's place (RoPE, arXiv 2104.09864): pairs
    of channels in a head's first half by its row, in the second by its column. `in_context` tokens have no place."""

    def __init__(self, hidden_size, num_heads, grid, in_context, dropout):
        super().__init__(hidden_size, num_heads, qk_norm=False)
        head_dim, self.dropout = hidden_size // num_heads, dropout
        self.q_norm, self.k_norm = RMSNorm(head_dim), RMSNorm(head_dim)
        line = torch.outer(torch.arange(grid), 10_000 ** -(torch.arange(head_dim // 4) / (head_dim / 4)))
        angles = torch.cat([line.repeat_interleave(grid, dim=0), line.repeat(grid, 1)], dim=1)
        angles = F.pad(angles, (0, 0, in_context, 0))  # [in_context + N, head dim / 2]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def turn(self, x):
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * self.cos - b * self.sin, a * self.sin + b * self.cos], dim=-1).flatten(-2).to(x.dtype)

    def heads(self, x):
        q, k, v = super().heads(x)
        return self.turn(q), self.turn(k), v

    def merge(self, out):
        return F.dropout(super().merge(out), self.dropout, self.training)


class Mlp(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, hidden_size, mlp_hidden_size):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_hidden_size)
        self.fc2 = nn.Linear(mlp_hidden_size, hidden_size)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """Gated MLP (arXiv 2002.05202), of about as many weights as Mlp has with the same mlp_hidden_size."""

    def __init__(self, hidden_size, mlp_hidden_size, dropout):
        super().__init__()
        self.dropout = dropout
        self.w12 = nn.Linear(hidden_size, 2 * int(mlp_hidden_size * 2 / 3))
        self.w3 = nn.Linear(int(mlp_hidden_size * 2 / 3), hidden_size)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.dropout(F.silu(gate) * value, self.dropout, self.training))


def modulate(x, shift, scale):
    """Adaptive layer norm's second half: x [B, N, D], shift and scale [B, D]."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    """Transformer block with adaLN-Zero conditioning (DiT, arXiv 2212.09748); with `return_qk` it
    hands out its (queries, keys), each [B, heads, N, head dim], as well."""

    def __init__(self, hidden_size, num_heads, mlp_ratio, qk_norm=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, qk_norm)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def add_attended(self, x, out, gate1, shift2, scale2, gate2):
        """Tokens x with what their heads attended to, then with the MLP's output, added."""
        x = x + gate1.unsqueeze(1) * self.attn.merge(out)
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))

    def forward(self, x, condition, return_qk=False):
        shift1, scale1, *others = self.adaLN_modulation(condition).chunk(6, dim=-1)
        q, k, v = self.attn.heads(modulate(self.norm1(x), shift1, scale1))
        x = self.add_attended(x, F.scaled_dot_product_attention(q, k, v), *others)
        return x, (q, k) if return_qk else None


class JointBlock(nn.Module):
    """MMDiT's block (arXiv 2403.03206): image and text have weights of their own, and one attention over both.

    Takes and returns image tokens [B, N, D] and text tokens [B, L, D]; (queries, keys) are the image's alone.
    """

    def __init__(self, hidden_size, num_heads, mlp_ratio, last):
        super().__init__()
        self.context_block = Block(hidden_size, num_heads, mlp_ratio)
        self.x_block = Block(hidden_size, num_heads, mlp_ratio)
        self.last = last
        if last:  # its text is there to be attended to, and ends there
            self.context_block.attn.proj = self.context_block.mlp = None
            self.context_block.adaLN_modulation[1] = nn.Linear(hidden_size, 2 * hidden_size)

    def forward(self, x, text, condition, return_qk=False):
        image_part, text_part = self.x_block, self.context_block
        shift, scale, *others = image_part.adaLN_modulation(condition).chunk(6, dim=-1)
        q, k, v = image_part.attn.heads(modulate(image_part.norm1(x), shift, scale))
        shift, scale, *text_others = text_part.adaLN_modulation(condition).chunk(2 if self.last else 6, dim=-1)
        text_q, text_k, text_v = text_part.attn.heads(modulate(text_part.norm1(text), shift, scale))
        out = F.scaled_dot_product_attention(q if self.last else torch.cat([q, text_q], dim=2),
                                             torch.cat([k, text_k], dim=2), torch.cat([v, text_v], dim=2))
        N = x.shape[1]
        x = image_part.add_attended(x, out[:, :, :N], *others)
        text = text if self.last else text_part.add_attended(text, out[:, :, N:], *text_others)
        return x, text, (q, k) if return_qk else None


class JiTBlock(Block):
    """Block with RMS norms, rotary attention and a gated MLP."""

    def __init__(self, hidden_size, num_heads, mlp_ratio, grid, in_context, dropout):
        super().__init__(hidden_size, num_heads, mlp_ratio)
        self.norm1, self.norm2 = RMSNorm(hidden_size), RMSNorm(hidden_size)
        self.attn = RotaryAttention(hidden_size, num_heads, grid, in_context, dropout)
        self.mlp = SwiGLU(hidden_size, int(hidden_size * mlp_ratio), dropout)


class FinalLayer(nn.Module):
    """Tokens [B, N, D] to patches [B, N, patch * patch * channels], and a class token before them to [B, cls_dim]."""

    def __init__(self, hidden_size, patch_size, out_channels, cls_dim):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.linear_cls = None if cls_dim is None else nn.Linear(hidden_size, cls_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, condition):
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        x = modulate(self.norm_final(x), shift, scale)
        cls = None if self.linear_cls is None else self.linear_cls(x[:, 0])
        return self.linear(x if cls is None else x[:, 1:]), cls


def sincos_pos_embed(hidden_size, grid):
    """Fixed 2-D sine-cosine position table [1, grid * grid, D] of MAE: first half by column, second half by row."""
    omega = 10_000 ** -(torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size / 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid, D / 2]
    return torch.cat([line.repeat(grid, 1), line.repeat_interleave(grid, dim=0)], dim=1)[None].float()


def initialize_linear(module):
    """Xavier weights and zero bias, for Module.apply: other modules are left alone."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class ConvProjector(nn.Module):
    """Tokens [B, N, D] of a square grid to [B, N, teacher_dim] by a 3 x 3 convolution (iREPA, arXiv 2512.10794)."""

    def __init__(self, hidden_size, teacher_dim):
        super().__init__()
        self.projection_layer = nn.Conv2d(hidden_size, teacher_dim, kernel_size=3, padding=1)

    def forward(self, x):
        grid = math.isqrt(x.shape[1])
        square = x[:, -grid * grid :].transpose(1, 2).unflatten(2, (grid, grid))  # without REG's class token
        return self.projection_layer(square).flatten(2).transpose(1, 2)


class DiffusionTransformer(nn.Module):
    """What the networks below share: from x_t [B, C, H, W] to its velocity, in blocks that run on patches.

    align_depth: `features` are the tokens after this many blocks, through the projector (REPA, arXiv 2410.06940).
    teacher_dim: width of the projector's output; None builds no projector. projector: "mlp" (REPA) or "conv" (iREPA).
    """

    def __init__(self, input_size, patch_size, in_channels, hidden_size, depth, num_heads, align_depth, teacher_dim):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"input_size {input_size} is no multiple of patch_size {patch_size}; "
                             f"choose a model whose patch divides it")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden_size {hidden_size} must be a multiple of num_heads {num_heads} and of 4")
        if teacher_dim is not None and not 1 <= align_depth <= depth:
            raise ValueError(f"align_depth {align_depth} is not one of the model's blocks 1..{depth}")
        self.input_size, self.patch_size, self.grid = input_size, patch_size, input_size // patch_size
        self.in_channels, self.num_heads = in_channels, num_heads
        self.align_depth, self.teacher_dim = align_depth, teacher_dim
        self.shape = self.state_shape = (in_channels, input_size, input_size)  # of latents; of x_t and velocity
        self.cls_dim, self.in_context_len, self.in_context_start = None, 0, 0  # SiT's own; JiT's own
        self.activation_checkpointing = False  # True: recompute each block in the backward pass, to save memory
        self.bf16_tokens = False  # True, under autocast: blocks add to tokens in bf16, which halves what they move

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid**2, hidden_size), requires_grad=False)

    def finish(self, out_channels, projector_dim, projector):
        """What follows the blocks, and the first weights."""
        hidden_size = self.pos_embed.shape[-1]
        self.final_layer = FinalLayer(hidden_size, self.patch_size, out_channels, self.cls_dim)
        self.initialize_weights()
        self.projectors = None
        if self.teacher_dim is not None:  # last, so that a seed makes the same student with and without it
            made = ConvProjector(hidden_size, self.teacher_dim) if projector == "conv" else nn.Sequential(
                nn.Linear(hidden_size, projector_dim), nn.SiLU(), nn.Linear(projector_dim, projector_dim), nn.SiLU(),
                nn.Linear(projector_dim, self.teacher_dim))
            self.projectors = nn.ModuleList([made.apply(initialize_linear)])  # published keys are projectors.0.*

    def initialize_weights(self):
        """DiT's initialisation: Xavier for linear layers, zero where a block or the output must start as nothing."""
        self.apply(initialize_linear)
        for convolution in self.x_embedder.children():
            nn.init.xavier_uniform_(convolution.weight.view(convolution.weight.shape[0], -1))
            if convolution.bias is not None:
                nn.init.zeros_(convolution.bias)
        tables = [module for module in self.modules() if isinstance(module, nn.Embedding)]
        for layer in (*tables, *self.t_embedder.mlp[::2]):
            nn.init.normal_(layer.weight, std=0.02)
        modulated = [module for module in self.modules() if isinstance(module, (Block, FinalLayer))]
        outputs = [layer for name, layer in self.final_layer.named_children() if name.startswith("linear")]
        for layer in (*(module.adaLN_modulation[1] for module in modulated), *outputs):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():  # a class token's place, the first, stays zero
            self.pos_embed[:, -self.grid**2 :] = sincos_pos_embed(self.pos_embed.shape[-1], self.grid)

    def unpatchify(self, x):
        """[B, N, patch * patch * C] to [B, C, H, W]."""
        g, p = self.grid, self.patch_size
        x = x.reshape(-1, g, g, p, p, x.shape[-1] // p**2).permute(0, 5, 1, 3, 2, 4)  # [B, C, rows, p, columns, p]
        return x.reshape(-1, x.shape[1], g * p, g * p)

    def run(self, x, condition, text, attn_layers, return_features, return_qk, in_context=None):
        """From x_t to the final layer's output, of the same shape: see SiT.forward. condition [B, D]; text: a list, of
        text tokens [B, L, D] or of nothing; in_context: tokens [B, L, D] to put in front, from in_context_start on."""
        if x.shape[1:] != self.state_shape:
            raise ValueError(f"x is {list(x.shape)}; this model takes [B, {', '.join(map(str, self.state_shape))}]")
        if any(not 0 <= layer < len(self.blocks) for layer in attn_layers):
            raise ValueError(f"attn_layers {list(attn_layers)} must lie in 0..{len(self.blocks) - 1}")
        if return_features and self.projectors is None:
            raise ValueError("return_features needs a projector; build the model with teacher_dim set")

        N, places = self.grid**2, self.pos_embed.shape[1]  # places: of tokens, with a class token 1 + N
        if self.cls_dim is not None:
            x, cls = unpack(x, self.shape)
            in_context = self.wg_norm(self.cls_projectors2(cls))[:, None] + self.pos_embed[:, :1]
        # [B, N, D]; stored that way too: the convolution leaves channels first, and every sum to the end would keep it
        x = (self.x_embedder(x) + self.pos_embed[:, -N:]).contiguous()
        x, *text = (tokens.to(torch.bfloat16 if self.bf16_tokens else self.pos_embed.dtype) for tokens in (x, *text))
        qk, features = {}, None
        for i, block in enumerate(self.blocks):
            if in_context is not None and i == self.in_context_start:
                x = torch.cat([in_context.to(x.dtype), x], dim=1)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, *text, qk[i] = checkpoint(block, x, *text, condition, i in attn_layers, use_reentrant=False)
            else:
                x, *text, qk[i] = block(x, *text, condition, i in attn_layers)
            if return_features and i + 1 == self.align_depth:
                features = self.projectors[0](x[:, -places:])
        patches, cls = self.final_layer(x[:, -places:], condition)
        output = self.unpatchify(patches)[:, : self.in_channels]  # of learn_sigma's 2C
        output = output if cls is None else pack(output, cls)
        qk = [[each[:, :, -N:] for each in qk[i]] for i in attn_layers]
        return output, [pair if return_qk else attention_logits(*pair) for pair in qk], features


class SiT(DiffusionTransformer):
    """The class-conditional network. class_dropout_prob: above 0, there is a "no label" to drop labels to, which is the
    caller's task. learn_sigma: the original SiT checkpoints' shapes, 2C output channels of which the first C are the
    velocity. cls_dim: width of the class token that REG (arXiv 2507.01467) denoises beside latents; None: none.
    """

    def __init__(self, *, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, num_classes=1000, class_dropout_prob=0.1, qk_norm=False, learn_sigma=False,
                 align_depth=8, teacher_dim=768, projector_dim=2048, projector="mlp", cls_dim=None):
        super().__init__(input_size, patch_size, in_channels, hidden_size, depth, num_heads, align_depth, teacher_dim)
        self.num_classes, self.cls_dim = num_classes, cls_dim
        if cls_dim is not None:
            self.state_shape = (1, 1, math.prod(self.shape) + cls_dim)  # of `pack`
            self.cls_projectors2, self.wg_norm = nn.Linear(cls_dim, hidden_size), nn.LayerNorm(hidden_size, eps=1e-6)
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, hidden_size), requires_grad=False)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio, qk_norm) for _ in range(depth))
        self.finish(in_channels * (2 if learn_sigma else 1), projector_dim, projector)

    def forward(self, x, t, y, attn_layers=(), return_features=False, return_qk=False):
        """Velocity at x_t, and on request what the alignment losses need.

        x [B, C, H, W]; t [B] in 0..1; y [B] int64 class ids, num_classes meaning "no label".
        Returns velocity [B, C, H, W]; attn_logits, a list of [B, heads, N, N] scaled and pre-softmax, one for each
        0-based block in attn_layers; features [B, N, teacher_dim], or None unless return_features. With return_qk
        each block's (queries, keys), [B, heads, N, head dim], stand in place of the logits that a loss makes of them.
        With cls_dim x and velocity are as of `pack`, and features, but for a convolution's, [B, 1 + N, teacher_dim].
        """
        return self.run(x, self.t_embedder(t) + self.y_embedder(y), [], attn_layers, return_features, return_qk)


class MMDiT(DiffusionTransformer):
    """The network for text (arXiv 2403.03206, as REPA and HASTE train it): text tokens pass through all blocks beside
    the image's; the time alone is the condition. context_dim: width of the text encoder's output."""

    def __init__(self, *, input_size=32, patch_size=2, in_channels=4, hidden_size=768, depth=24, num_heads=24,
                 mlp_ratio=4.0, context_dim=768, align_depth=8, teacher_dim=768, projector_dim=2048, projector="mlp"):
        super().__init__(input_size, patch_size, in_channels, hidden_size, depth, num_heads, align_depth, teacher_dim)
        self.context_embedder = nn.Linear(context_dim, hidden_size)
        self.joint_blocks = nn.ModuleList(JointBlock(hidden_size, num_heads, mlp_ratio, last=i + 1 == depth)
                                          for i in range(depth))
        self.finish(in_channels, projector_dim, projector)

    @property
    def blocks(self):
        return self.joint_blocks  # by their published name

    def forward(self, x, t, context, attn_layers=(), return_features=False, return_qk=False):
        """As SiT.forward, but for context [B, L, context_dim], the text encoder's output, that of
        the empty text meaning "no text". N are the image's tokens in all that is returned."""
        text = self.context_embedder(context)
        return self.run(x, self.t_embedder(t), [text], attn_layers, return_features, return_qk)


class JiT(DiffusionTransformer):
    """The network for pixels (arXiv 2511.13720): large patches, and inside it predicts the image, not the velocity.

    From block in_context_start on, in_context_len tokens of the class stand in front. dropout: in the middle half of
    the blocks. t_eps: from this time on the velocity is the predicted image's; below, a part of it.
    """

    def __init__(self, *, input_size=256, patch_size=16, in_channels=3, hidden_size=768, depth=12, num_heads=12,
                 mlp_ratio=4.0, num_classes=1000, class_dropout_prob=0.1, bottleneck_dim=128, in_context_len=32,
                 in_context_start=4, dropout=0.0, t_eps=0.05, align_depth=4, teacher_dim=768, projector_dim=2048,
                 projector="mlp"):
        super().__init__(input_size, patch_size, in_channels, hidden_size, depth, num_heads, align_depth, teacher_dim)
        self.num_classes, self.t_eps = num_classes, t_eps
        self.in_context_len, self.in_context_start = in_context_len, in_context_start
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size, bottleneck_dim)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        if in_context_len:
            self.in_context_posemb = nn.Parameter(0.02 * torch.randn(1, in_context_len, hidden_size))
        self.blocks = nn.ModuleList(
            JiTBlock(hidden_size, num_heads, mlp_ratio, self.grid, in_context_len * (i >= in_context_start),
                     dropout * (depth // 4 <= i < 3 * (depth // 4))) for i in range(depth))
        self.finish(in_channels, projector_dim, projector)
        self.final_layer.norm_final = RMSNorm(hidden_size)

    def forward(self, x, t, y, attn_layers=(), return_features=False, return_qk=False):
        """As SiT.forward; queries and keys are those that attend, normed and turned, of the image's tokens alone."""
        label = self.y_embedder(y)
        in_context = label[:, None] + self.in_context_posemb if self.in_context_len else None
        image, *others = self.run(x, self.t_embedder(1 - t) + label, [], attn_layers, return_features, return_qk,
                                  in_context)
        return (x - image) / t.clamp(min=self.t_eps).view(-1, 1, 1, 1), *others


def build(name, **overrides):
    """The network called `name` ("SiT-XL/2", see MODELS), with any of its arguments overridden."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; choose one of {', '.join(MODELS)}")
    return make_network({**MODELS[name], **overrides})


def make_network(arguments):
    """The network that takes these arguments, by those that others do not take."""
    return (MMDiT if "context_dim" in arguments else JiT if "bottleneck_dim" in arguments else SiT)(**arguments)


def path_coefficients(t, path):
    """alpha, sigma of x_t = alpha x + sigma noise, and their derivatives by t, for times t (any shape)."""
    if path == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    if path == "cosine":
        angle = t * (torch.pi / 2)
        return angle.cos(), angle.sin(), -torch.pi / 2 * angle.sin(), torch.pi / 2 * angle.cos()
    raise ValueError(f"unknown path {path!r}; choose 'linear' or 'cosine'")


def interpolate(x, noise, t, path="linear"):
    """x_t = alpha(t) x + sigma(t) noise and its velocity d x_t / dt. x and noise [B, C, H, W], t [B] in 0..1."""
    alpha, sigma, d_alpha, d_sigma = path_coefficients(t.view(-1, 1, 1, 1), path)
    return alpha * x + sigma * noise, d_alpha * x + d_sigma * noise


def pack(latents, cls):
    """Latents [B, C, h, w] and class tokens [B, E] as a state [B, 1, 1, C h w + E], noised and sampled like latents."""
    return torch.cat([latents.flatten(1), cls], dim=1)[:, None, None]


def unpack(packed, shape):
    """(latents [B, C, h, w], class tokens [B, E]) of a packed state, by shape (C, h, w); of mere latents E is 0."""
    latents, cls = packed.flatten(1).tensor_split([math.prod(shape)], dim=1)
    return latents.unflatten(1, shape), cls
