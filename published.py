"""Checkpoints that others published (SiT, REPA, HASTE, JiT, MMDiT): read without running code in them, their settings
read off the names and shapes of their weights."""

import json
import math
import re
import zipfile

import torch
from safetensors import safe_open

from model import MODELS


def read_weights(path, average):
    """(weights by name, the settings in the file's header or None) of a checkpoint, without running code in it."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {}).get("settings", "null"))
            return {key: file.get_tensor(key) for key in file.keys()}, settings
    # of what else pickles may hold, only their training arguments' class is let in, for which this stands
    namespace = type("Namespace", (), dict(__module__="argparse"))
    with torch.serialization.safe_globals([namespace]):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if average is None:
        state = state.get("ema", state)
    return state.get(average or "model_ema1", state), None


def with_our_names(state):
    """Published weights by the names that ours have, without the projector's."""
    state = {re.sub(r"^(module\.|_orig_mod\.|net\.)+", "", key): value for key, value in state.items()}
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    after = lambda found: f"blocks.{depth + int(found[1])}"  # REPA's first files number these anew
    return {re.sub(r"^decoder_blocks\.(\d+)", after, key): value for key, value in state.items()
            if not key.startswith("projectors.")}


def with_time_from_data(state, channels):
    """The weights of SiT's first release, whose time runs from noise to data, turned to our time: where ours sees the
    cosines and sines of t f it saw those of (1 - t) f, so the first layer is turned by f, and the velocity's sign.
    channels: of the velocity, the first half of what it hands out."""
    state, first = dict(state), state["t_embedder.mlp.0.weight"]
    half = first.shape[1] // 2
    f = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float64) / half)
    cosine, sine = first.double().chunk(2, dim=1)
    turned = [cosine * f.cos() + sine * f.sin(), cosine * f.sin() - sine * f.cos()]
    state["t_embedder.mlp.0.weight"] = torch.cat(turned, dim=1).to(first.dtype)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[name] = -state[name].unflatten(0, (-1, 2 * channels))[:, :channels].flatten(0, 1)
    return state


def published_settings(state):
    """Settings for a published checkpoint, read off the names and shapes of its weights. Raises KeyError for others."""
    of_pixels = "x_embedder.proj1.weight" in state  # a JiT
    width, channels, patch, _ = state["x_embedder.proj1.weight" if of_pixels else "x_embedder.proj.weight"].shape
    _, N, hidden = state["pos_embed"].shape
    depth = len({key.split(".")[1] for key in state if key.startswith(("blocks.", "joint_blocks."))})
    known = {(m["hidden_size"], m["depth"]): m for m in MODELS.values() if ("bottleneck_dim" in m) == of_pixels}
    sit = dict(input_size=round(N**0.5) * patch, patch_size=patch, in_channels=channels, hidden_size=hidden,
               depth=depth, num_heads=known[hidden, depth]["num_heads"])
    learn_sigma = state["final_layer.linear.weight"].shape[0] == 2 * patch**2 * channels
    if "context_embedder.weight" in state:
        sit["context_dim"] = state["context_embedder.weight"].shape[1]
    else:
        sit.update(num_classes=state["y_embedder.embedding_table.weight"].shape[0] - 1, class_dropout_prob=0.1)
        if of_pixels:
            sit.update(bottleneck_dim=width, in_context_len=state["in_context_posemb"].shape[1],
                       in_context_start=known[hidden, depth].get("in_context_start", 4))
        else:
            sit.update(qk_norm="blocks.0.attn.q_norm.weight" in state, learn_sigma=learn_sigma)
    # SiT's first release has its time run the other way, from noise to data
    return dict(sit=sit, PATH="linear", time_from_noise=learn_sigma, LABEL_DROPOUT=0.1,
                NOISE_SCALE=sit["input_size"] / 256 if of_pixels else 1.0,
                TEXT_ENCODER="openai/clip-vit-large-patch14", TEXT_LENGTH=77,
                data=dict(vae=None if of_pixels else dict(name="stabilityai/sd-vae-ft-ema", scale=0.18215)))
