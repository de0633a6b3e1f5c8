"""The frozen vision teacher: a timm vision transformer, with the logits of chosen attention layers.
Which families of them work, experiments/README.md says in a table.

    teacher = Teacher("vit_base_patch14_dinov2.lvd142m", layers=(8, 9, 10, 11), input_size=224)
    tokens, attn_logits = teacher(images)

In place of a timm name serves the path of a .safetensors file whose header says how to build the network. For data that
DINOv2 does not suit, experiments/train_network.py makes one, as it did data/teacher.safetensors.
"""

import json
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from timm.layers import AttentionRope, PatchEmbed, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn

from model import attention_logits

USUAL = {(Block, Attention), (EvaBlock, EvaAttention), (EvaBlock, AttentionRope)}  # what forward steps through


def preprocess(images, mean, std, size):
    """uint8 [B, 3, H, W] to float32 [B, 3, size, size]: normalised first, then resized (bicubic, no antialias, no
    clamp), in this order because HASTE's train.py does so. mean, std: of each channel, in 0..1."""
    mean, std = (torch.as_tensor(v, dtype=torch.float32, device=images.device).view(1, 3, 1, 1) for v in (mean, std))
    x = (images.float() / 255 - mean) / std
    return x if x.shape[-2:] == (size, size) else F.interpolate(x, (size, size), mode="bicubic", align_corners=False)


def load_network(name, pretrained=True):
    """The network called `name`, in eval mode: a timm name, or a .safetensors file of experiments/train_network.py.

    Its mean, std and input size stand in `timm.data.resolve_model_data_config(network)`. Raises
    ValueError if the name is unknown, the weights cannot be fetched, or the file is damaged.
    """
    if str(name).endswith(".safetensors"):
        if not Path(name).exists():
            raise ValueError(f"{name}: no such file; make one with experiments/train_network.py or use a timm name")
        try:
            with safe_open(name, "pt") as file:
                header = json.loads(file.metadata()["network"])
                state = {key: file.get_tensor(key).float() for key in file.keys()}
            network = timm.create_model(header["architecture"], pretrained=False, num_classes=header["num_classes"],
                                        pretrained_cfg_overlay=header["input"], **header["settings"])
            network.load_state_dict(state)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name}: not a network of experiments/train_network.py, or damaged "
                             f"({str(error).splitlines()[0]}); copy or make it again") from error
        return network.eval()
    if not timm.is_model(str(name)):
        raise ValueError(f"unknown network {name!r}: neither a timm model nor a .safetensors file; "
                         f"timm.list_models() lists the names")
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0).eval()
    except Exception as error:  # the hub, the network stack and timm each raise their own; the user's remedy is one
        if not timm.is_model_pretrained(name):
            known = timm.list_pretrained(f"{name.partition('.')[0]}.*")
            raise ValueError(f"timm has no weights called {name!r}; choose one of {', '.join(known)}" if known else
                             f"timm has no weights of {name!r}; choose another network") from error
        raise ValueError(f"the weights of {name!r} could not be fetched ({type(error).__name__}); "
                         "check the connection, or fetch them where there is one and copy the "
                         "Hugging Face cache (HF_HOME)") from error


def why_unusual(block):
    """What in a timm block keeps Teacher from stepping through it; None if nothing does."""
    attn = getattr(block, "attn", None)
    if (type(block), type(attn)) not in USUAL:
        return f"{type(block).__name__}, {type(attn).__name__}"
    if getattr(attn, "gate", None) is not None:
        return "its output is gated"
    if getattr(attn, "num_kv_groups", 1) > 1:
        return "heads share keys"
    return None


def attention_with_qk(attn, x, rope=None):
    """timm's self-attention on x [B, T, D], and its (queries, keys), each [B, heads, T, head dim].

    rope: sines and cosines by which queries and keys of the N patches are rotated, [(heads,) N, 2 head dim].
    """
    B, T, _ = x.shape
    if attn.qkv is None:
        qkv = torch.cat([attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)], dim=-1)
    elif getattr(attn, "q_bias", None) is not None:
        qkv = F.linear(x, attn.qkv.weight, torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]))
    else:
        qkv = attn.qkv(x)
    q, k, v = qkv.reshape(B, T, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        q, k = (rotate_patches(each, rope, attn).type_as(v) for each in (q, k))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, -1)
    return attn.proj(getattr(attn, "norm", nn.Identity())(out)), (q, k)


def rotate_patches(x, rope, attn):
    """Queries or keys [B, heads, T, head dim] with those of patches rotated; others have no place."""
    prefix, patches = x.tensor_split([attn.num_prefix_tokens], dim=2)
    return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=attn.rotate_half)], dim=2)


def layer_scales(block):
    """By what a timm block multiplies what its attention and its MLP give: [D], or 1 without LayerScale."""
    if isinstance(block, EvaBlock):
        return [1 if gamma is None else gamma for gamma in (block.gamma_1, block.gamma_2)]
    return [getattr(each, "gamma", 1) for each in (block.ls1, block.ls2)]


class Teacher(nn.Module):
    """A frozen vision transformer: final patch tokens, and the attention logits of `layers`.

    name_or_timm_model: what load_network takes, or a timm VisionTransformer or Eva (it is kept, and
        resized in place).
    layers: 0-based.
    input_size: edge in pixels at which the network runs, a multiple of its patch; images of another
        size are resized, and the position table is resampled to the grid with antialias, as timm does.
    Tokens are those of timm's forward_features, which its final norm has normed. "Gap" networks norm but
        the mean of them, by fc_norm: here it norms each. PE-spatial, InternViT and RADIO have no final norm.
    Raises ValueError for a network without patches or plain self-attention, a layer it has not, or an
    impossible input_size.
    """

    def __init__(self, name_or_timm_model, layers, input_size, pretrained=True):
        super().__init__()
        network = name_or_timm_model
        if not isinstance(network, nn.Module):
            network = load_network(network, pretrained)
        kind = type(network).__name__
        if not isinstance(network, (VisionTransformer, Eva)):
            raise ValueError(f"teacher {kind} has no attention of the usual kind; "
                             "choose a timm VisionTransformer or Eva")
        if not isinstance(network.patch_embed, PatchEmbed):
            raise ValueError(f"teacher {kind} is a hybrid, a convolutional network makes its tokens "
                             f"({type(network.patch_embed).__name__}); choose a timm ViT of plain patches")
        self.layers = tuple(layers)
        depth, patch = len(network.blocks), network.patch_embed.patch_size[0]
        if any(not 0 <= layer < depth for layer in self.layers):
            raise ValueError(f"teacher layers {list(self.layers)} must lie in 0..{depth - 1}; change LAYER_PAIRS")
        for layer in self.layers:
            if why := why_unusual(network.blocks[layer]):
                raise ValueError(f"teacher {kind} has no attention of the usual kind in layer {layer} "
                                 f"({why}); choose another timm ViT")
        if input_size % patch:
            raise ValueError(f"teacher input_size {input_size} is no multiple of its patch size "
                             f"{patch}; take the student's grid times {patch}")
        config = timm.data.resolve_model_data_config(network)
        network.set_input_size(img_size=(input_size, input_size))
        self.input_size, self.dim, self.grid = input_size, network.embed_dim, input_size // patch
        for name in ("mean", "std"):  # on the device from the start: copying them would wait for it at every call
            self.register_buffer(name, torch.tensor(config[name], dtype=torch.float32), persistent=False)
        self.network, self.has_class_token = network.eval().requires_grad_(False), network.cls_token is not None
        # Once, as at each call timm may make a rotary embedding on the host, a wait. What it adds to
        # patches and puts before them is what it makes of patches that are zero.
        pixels = network.patch_embed.proj.weight.new_zeros(1, 3, input_size, input_size)
        with torch.no_grad():
            positions = network._pos_embed(torch.zeros_like(network.patch_embed(pixels)))
        positions, rope = positions if isinstance(network, Eva) else (positions, None)
        if rope is not None and rope.ndim == 2:  # one for all blocks; "mixed" has one for each
            rope = rope.expand(depth, -1, -1)
        self.register_buffer("positions", positions, persistent=False)  # [1, prefix + N, D]
        self.register_buffer("rope", rope, persistent=False)  # None or [depth, (heads,) N, 2 head dim]

    def train(self, mode=True):
        return super().train(False)  # frozen: no dropout, no stochastic depth, whatever the student does

    @torch.no_grad()
    def all_tokens(self, images):
        """images uint8 [B, 3, H, W] to [B, prefix + N, D], and what forward returns with return_qk."""
        network, prefix = self.network, self.network.num_prefix_tokens
        x = preprocess(images, self.mean, self.std, self.input_size)
        x = network.patch_embed(x).flatten(1, -2) + self.positions[:, prefix:]  # [B, N, D]
        x = torch.cat([self.positions[:, :prefix].expand(len(x), -1, -1), x], dim=1)
        x = network.norm_pre(x)
        qk = {}
        for i, block in enumerate(network.blocks):
            rope = {} if self.rope is None else {"rope": self.rope[i]}
            if i in self.layers:
                attended, (q, k) = attention_with_qk(block.attn, block.norm1(x), **rope)
                qk[i] = q[:, :, prefix:], k[:, :, prefix:]
                of_attention, of_mlp = layer_scales(block)
                x = x + of_attention * attended
                x = x + of_mlp * block.mlp(block.norm2(x))
            else:
                x = block(x, **rope)
        norm = network.fc_norm if isinstance(network.norm, nn.Identity) else network.norm
        return norm(x), [qk[layer] for layer in self.layers]

    def forward(self, images, return_qk=False):
        """images uint8 [B, 3, H, W] to tokens [B, N, D] and a list of logits [B, heads, N, N], one per layer asked for:
        q k^T / sqrt(head dim), after norm and rotary embedding. Class and register tokens are cut from tokens, rows and
        columns. With return_qk each layer's (queries, keys), [B, heads, N, head dim], stand in place of its logits."""
        tokens, chosen = self.all_tokens(images)
        tokens = tokens[:, self.network.num_prefix_tokens :]
        return tokens, chosen if return_qk else [attention_logits(q, k) for q, k in chosen]

    def class_token(self, images):
        """images uint8 [B, 3, H, W] to [B, D]: the class token; of a network without one the mean of its tokens."""
        tokens, _ = self.all_tokens(images)
        return tokens[:, 0] if self.has_class_token else tokens[:, self.network.num_prefix_tokens :].mean(dim=1)


def teacher_for_grid(name, layers, grid):
    """The Teacher `name` at the image size that gives grid x grid tokens, whatever the size of the images."""
    network = load_network(name)
    usual = isinstance(network, (VisionTransformer, Eva))  # another is refused by Teacher
    patch = network.patch_embed.patch_size[0] if usual else 1
    return Teacher(network, layers, input_size=grid * patch)
