"""The weights that a run begins with when train.INIT_FROM names some: out of any checkpoint that can be sampled from,
taken as they are, adapted to another number of classes or another grid, or left out for the run's fresh ones."""

import torch
import torch.nn.functional as F

from checkpoint import load_model
from checks import told_apart
from model import make_network
from published import with_time_from_data

# what depends on the latents' channels, on the text encoder, and on REG's class token
PARTS = ("x_embedder", "final_layer.linear", "context_embedder", "cls_projectors2", "wg_norm", "final_layer.linear_cls")


def is_in(name, parts):
    """Whether a weight is of one of these parts of the network."""
    return name.startswith(tuple(f"{part}." for part in parts))


def kind_of(network):
    """In words, what weights of other networks must agree in."""
    return (f"{type(network).__name__} of {len(network.blocks)} blocks of width {network.pos_embed.shape[-1]}, "
            f"{network.num_heads} heads and patch {network.patch_size}")


def adapted_classes(table, theirs, ours, rows):
    """The rows [rows, D] for so many classes of ours, and "no label", from a table of theirs: classes of another number
    all begin as "no label", or the mean where there is none."""
    null = table[theirs:] if len(table) > theirs else table.mean(dim=0, keepdim=True)
    return torch.cat([table[:theirs] if ours == theirs else null.expand(ours, -1), null])[:rows]


def initial_weights(path, network, settings):
    """(weights for a new network of these arguments, out of those that load_model reads; a line that says what of them
    was adapted, what begins fresh, and what differs besides). Raises ValueError for another kind of network or path."""
    source, theirs = load_model(path, constant="INIT_FROM")
    with torch.device("meta"):
        model = make_network({**network, "teacher_dim": None})
    kinds = [f"{kind_of(each)}, path {its['PATH']!r}" for each, its in ((source, theirs), (model, settings))]
    remedy = "set MODEL and PATH to the same, or INIT_FROM to other weights or None"
    if kinds[0] != kinds[1]:
        raise ValueError(f"INIT_FROM {path}: {kinds[0]}, but this run's is {kinds[1]}; {remedy}")
    weights, wanted = source.state_dict(), model.state_dict()
    if theirs.get("time_from_noise"):
        weights = with_time_from_data(weights, source.in_channels)
    like = lambda name: name in weights and name in wanted and weights[name].shape == wanted[name].shape

    unlike = [part for part in PARTS if not all(like(name) for name in {**wanted, **weights} if is_in(name, [part]))]
    fresh = [part for part in unlike if any(is_in(name, [part]) for name in wanted)]
    weights = {name: weight for name, weight in weights.items() if not is_in(name, unlike)}
    adapted, classes = [], "y_embedder.embedding_table.weight"
    if classes in weights and not like(classes):
        rows = len(wanted[classes])
        weights[classes] = adapted_classes(weights[classes], source.num_classes, model.num_classes, rows)
        adapted.append(f"{source.num_classes:,} classes to {model.num_classes:,}")
    positions = weights["pos_embed"][:, -(source.grid**2) :]  # [1, N, D]
    if source.grid != model.grid:
        square = positions.unflatten(1, (source.grid, source.grid)).permute(0, 3, 1, 2)
        square = F.interpolate(square, (model.grid, model.grid), mode="bicubic")  # beyond a table nothing was learned
        positions = square.flatten(2).transpose(1, 2)
        adapted.append(f"{source.grid} x {source.grid} positions to {model.grid} x {model.grid}")
    weights["pos_embed"] = F.pad(positions, (0, 0, int(model.cls_dim is not None), 0))  # a class token's is zero

    differing = [name for name in {**wanted, **weights} if not like(name) and not is_in(name, unlike)]
    if differing:
        raise ValueError(f"INIT_FROM {path}: differs from this run's network in {differing[0]}; {remedy}")
    before, now = (dict(each, VAE=each["data"]["vae"]) for each in (theirs, settings))
    asked = ["VAE", "NOISE_SCALE", "TEXT_ENCODER"][: 3 if "context_dim" in network else 2]
    differing = [f"{key} {told_apart(before[key], now[key])}" for key in asked if before.get(key, now[key]) != now[key]]
    parts = {"adapted": adapted, "fresh": [*fresh, "projector"], "differs": differing,
             "left out": [part for part in unlike if part not in fresh]}
    told = [f"{what}: {', '.join(which)}" for what, which in parts.items() if which]
    return weights, f"{path}: {len(weights)} tensors to start from; {'; '.join(told)}\n"
