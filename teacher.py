"""The frozen vision teacher: any timm vision transformer, with the logits of chosen attention layers.

    Teacher("vit_base_patch14_dinov2.lvd142m", layers=(8, 9, 10, 11), input_size=224)
    python teacher.py        # trains a small network on a prepared data set's labels, for data DINOv2 does not suit

The second writes OUT, a .safetensors file whose header says how to build the network; its path is as good a name as
timm's. data/README.md says how data/teacher.safetensors and data/judge.safetensors were made.
"""

import json
import os
import sys
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

# training of a small network: the first of the two passes that made data/teacher.safetensors (see experiments/)
DATA_DIR = "data/fashion_mnist_60000"  # prepared data set with labels
TEST_DIR = "data/fashion_mnist_10000"  # prepared data set to report the accuracy on; None: none
OUT = "data/teacher.safetensors"
ARCHITECTURE = "vit_tiny_patch16_224"  # timm name ...
ARCHITECTURE_SETTINGS = dict(img_size=28, patch_size=4, embed_dim=96, depth=4, num_heads=3,  # ... and what we change:
                             class_token=False, global_pool="avg", fc_norm=False)  # the tokens carry the class
EPOCHS = 15
BATCH_SIZE = 64
LEARNING_RATE = 2e-3  # peak of a one-cycle schedule
WEIGHT_DECAY = 0.05
MIRROR = True  # show each image mirrored with probability 0.5
SHIFT = 0  # show each image moved by up to so many pixels
EMA_DECAY = 0.0  # of the weights, of which the average is kept; 0: the last weights
START_FROM = None  # a file that main() wrote, to train on from its weights
SEED = 0


def preprocess(images, mean, std, size):
    """uint8 [B, 3, H, W] to float32 [B, 3, size, size]: normalised first, then resized (bicubic, no antialias, no
    clamp), in this order because HASTE's train.py does so."""
    mean, std = (torch.as_tensor(v, dtype=torch.float32, device=images.device).view(1, 3, 1, 1) for v in (mean, std))
    x = (images.float() / 255 - mean) / std
    return x if x.shape[-2:] == (size, size) else F.interpolate(x, (size, size), mode="bicubic", align_corners=False)


def shift(images, most):
    """Images [B, C, H, W], each moved at random by up to `most` pixels in both directions; black moves in."""
    B, _, H, W = images.shape
    top, left = torch.randint(0, 2 * most + 1, (2, B, 1, 1))
    rows, columns = top + torch.arange(H).view(-1, 1), left + torch.arange(W)
    return F.pad(images, (most,) * 4)[torch.arange(B).view(-1, 1, 1), :, rows, columns].permute(0, 3, 1, 2)


def load_network(name, pretrained=True):
    """The network called `name`, in eval mode: a timm name, or a .safetensors file that main() wrote.

    Its mean, std and input size stand in `timm.data.resolve_model_data_config(network)`. Raises ValueError if the name
    is unknown, the weights cannot be fetched, or the file is damaged.
    """
    if str(name).endswith(".safetensors"):
        if not Path(name).exists():
            raise ValueError(f"{name}: no such file; make one with teacher.py or use a timm name")
        try:
            with safe_open(name, "pt") as file:
                header = json.loads(file.metadata()["network"])
                state = {key: file.get_tensor(key).float() for key in file.keys()}
            network = timm.create_model(header["architecture"], pretrained=False, num_classes=header["num_classes"],
                                        pretrained_cfg_overlay=header["input"], **header["settings"])
            network.load_state_dict(state)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name}: not a network written by teacher.py ({str(error).splitlines()[0]}); "
                             f"copy or make it again") from error
        return network.eval()
    if not timm.is_model(str(name)):
        raise ValueError(f"unknown network {name!r}: neither a timm model nor a .safetensors file; "
                         f"timm.list_models() lists the names")
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0).eval()
    except Exception as error:  # the hub, the network stack and timm each raise their own; the user's remedy is one
        raise ValueError(f"the weights of {name!r} could not be fetched ({type(error).__name__}); check the "
                         f"connection, or fetch them where there is one and copy the Hugging Face cache "
                         f"(HF_HOME)") from error


def attention_with_qk(attn, x):
    """timm's self-attention on x [B, T, D], and its (queries, keys), each [B, heads, T, head dim]."""
    B, T, _ = x.shape
    qkv = attn.qkv(x).reshape(B, T, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, -1)
    return attn.proj(getattr(attn, "norm", nn.Identity())(out)), (q, k)


class Teacher(nn.Module):
    """A frozen vision transformer: final normed patch tokens, and the attention logits of `layers` (0-based).

    name_or_timm_model: what load_network takes, or a timm VisionTransformer (it is kept, and resized in place).
    input_size: edge in pixels at which the network runs, a multiple of its patch; images of another size are resized,
        and the position table is resampled to the grid with antialias, as timm does.
    Raises ValueError for a network without plain self-attention, a layer it has not, or an impossible input_size.
    """

    def __init__(self, name_or_timm_model, layers, input_size, pretrained=True):
        super().__init__()
        network = name_or_timm_model
        if not isinstance(network, nn.Module):
            network = load_network(network, pretrained)
        kind = type(network).__name__
        if not isinstance(network, VisionTransformer):
            raise ValueError(f"teacher {kind} has no attention of the usual kind; choose a timm VisionTransformer")
        self.layers = tuple(layers)
        depth, patch = len(network.blocks), network.patch_embed.patch_size[0]
        if any(not 0 <= layer < depth for layer in self.layers):
            raise ValueError(f"teacher layers {list(self.layers)} must lie in 0..{depth - 1}; change LAYER_PAIRS")
        for layer in self.layers:
            block = network.blocks[layer]
            attn = getattr(block, "attn", None)
            if type(block) is not Block or type(attn) is not Attention or getattr(attn, "gate", None) is not None:
                raise ValueError(f"teacher {kind} has no attention of the usual kind in layer {layer} "
                                 f"({type(block).__name__}, {type(attn).__name__}); choose another timm ViT")
        if input_size % patch:
            raise ValueError(f"teacher input_size {input_size} is no multiple of its patch size {patch}; "
                             f"take the student's grid times {patch}")
        config = timm.data.resolve_model_data_config(network)
        network.set_input_size(img_size=(input_size, input_size))
        self.input_size, self.mean, self.std = input_size, config["mean"], config["std"]
        self.dim, self.grid = network.embed_dim, input_size // patch
        self.network = network.eval().requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)  # frozen: no dropout, no stochastic depth, whatever the student does

    @torch.no_grad()
    def forward(self, images, return_qk=False):
        """images uint8 [B, 3, H, W] to tokens [B, N, D] and a list of logits [B, heads, N, N], one per layer asked for.

        Class and register tokens are cut from tokens and from the logits' rows and columns. With return_qk each layer's
        (queries, keys), [B, heads, N, head dim], stand in place of its logits q k^T / sqrt(head dim).
        """
        network, prefix = self.network, self.network.num_prefix_tokens
        x = preprocess(images, self.mean, self.std, self.input_size)
        x = network.norm_pre(network.patch_drop(network._pos_embed(network.patch_embed(x))))
        qk = {}
        for i, block in enumerate(network.blocks):
            if i in self.layers:
                attended, (q, k) = attention_with_qk(block.attn, block.norm1(x))
                qk[i] = q[:, :, prefix:], k[:, :, prefix:]
                x = x + block.ls1(attended)
                x = x + block.ls2(block.mlp(block.norm2(x)))
            else:
                x = block(x)
        chosen = [qk[layer] for layer in self.layers]
        if not return_qk:
            chosen = [(q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) for q, k in chosen]
        return network.norm(x)[:, prefix:], chosen


def teacher_for_grid(name, layers, grid):
    """The Teacher `name` at the image size that gives grid x grid tokens, whatever the size of the images."""
    network = load_network(name)
    patch = network.patch_embed.patch_size[0] if hasattr(network, "patch_embed") else 1
    return Teacher(network, layers, input_size=grid * patch)


def main():
    from torch.utils.data import DataLoader

    from prepare_latents import PreparedDataset  # only training needs it; Teacher stands alone

    data = PreparedDataset(DATA_DIR)
    test = None if TEST_DIR is None else PreparedDataset(TEST_DIR)
    if test is not None and test.classes != data.classes:
        raise ValueError(f"{TEST_DIR} has other classes than {DATA_DIR}; set TEST_DIR to its test images, or to None")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(SEED)
    size, num_classes = data.meta["image_size"], len(data.classes)
    network = timm.create_model(ARCHITECTURE, pretrained=False, num_classes=num_classes, **ARCHITECTURE_SETTINGS)
    if START_FROM is not None:
        network.load_state_dict(load_network(START_FROM).state_dict())
    network.to(device)
    sample = data.images(range(0, len(data), max(1, len(data) // 2000))).float() / 255
    mean, std = sample.mean(dim=(0, 2, 3)).tolist(), sample.std(dim=(0, 2, 3)).tolist()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * (len(data) // BATCH_SIZE)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.15)

    order = torch.cat([torch.randperm(len(data))[: steps // EPOCHS * BATCH_SIZE] for _ in range(EPOCHS)])
    loader = DataLoader(data, sampler=order.view(-1, BATCH_SIZE).numpy(), batch_size=None)
    network.train()
    with tqdm(loader, desc=Path(OUT).stem) as bar:
        for step, (_, labels, images) in enumerate(bar):
            images = shift(images, SHIFT) if SHIFT else images
            x = preprocess(images.to(device), mean, std, size)
            if MIRROR:
                x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(3), x)
            loss = F.cross_entropy(network(x), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(network)
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")

    network = average.module.half().float().eval()  # what the file holds is what is measured
    accuracy = None
    if test is not None:
        with torch.no_grad():
            right = sum((network(preprocess(images.to(device), mean, std, size)).argmax(1).cpu() == labels).sum().item()
                        for _, labels, images in (test[indices] for indices in
                                                  torch.arange(len(test)).split(500)))
        accuracy = right / len(test)
    header = dict(architecture=ARCHITECTURE, settings=ARCHITECTURE_SETTINGS, num_classes=num_classes,
                  input=dict(mean=mean, std=std, input_size=(3, size, size)), classes=data.classes, accuracy=accuracy,
                  trained_on=data.meta["source"], images=len(data), epochs=EPOCHS, seed=SEED, started_from=START_FROM)
    temporary = f"{OUT}.tmp{os.getpid()}"
    save_file({key: value.half().cpu() if value.is_floating_point() else value.cpu()
               for key, value in network.state_dict().items()}, temporary, metadata=dict(network=json.dumps(header)))
    os.replace(temporary, OUT)
    print(f"{OUT}: {os.path.getsize(OUT) / 1e6:.2f} MB, "
          + ("no test set" if accuracy is None else f"{accuracy:.2%} of {len(test):,} test images right"))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # bad input: its one line says what, where and the remedy
        sys.exit(f"teacher.py: {error}")
