"""Trains a small network on a prepared data set's labels: a teacher or a judge for images that DINOv2 does not suit.

    python -m experiments.train_network

Writes OUT, a .safetensors file whose header says how to build the network: TEACHER and fid.FEATURES take its path.
fashion_mnist_networks.py made data/teacher.safetensors and data/judge.safetensors with it.
"""

if not __package__:
    raise SystemExit("run it from the repository's root: python -m experiments.train_network")

import json
import os
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from checks import check_writable
from dataset import PreparedDataset
from runtime import ends_in_one_line, run_script, write_atomically
from teacher import load_network, preprocess

# the first of the two passes that made data/teacher.safetensors
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


def shift(images, most):
    """Images [B, C, H, W], each moved at random by up to `most` pixels in both directions; black moves in."""
    B, _, H, W = images.shape
    top, left = torch.randint(0, 2 * most + 1, (2, B, 1, 1))
    rows, columns = top + torch.arange(H).view(-1, 1), left + torch.arange(W)
    return F.pad(images, (most,) * 4)[torch.arange(B).view(-1, 1, 1), :, rows, columns].permute(0, 3, 1, 2)


@ends_in_one_line
def main():
    data = PreparedDataset(DATA_DIR)
    test = None if TEST_DIR is None else PreparedDataset(TEST_DIR)
    if test is not None and test.classes != data.classes:
        raise ValueError(f"{TEST_DIR} has other classes than {DATA_DIR}; set TEST_DIR to its test images, or to None")
    check_writable(OUT)
    if len(data) < BATCH_SIZE:
        raise ValueError(f"BATCH_SIZE {BATCH_SIZE}: {DATA_DIR} has {len(data)} images; set it to so many at most")
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
        right = 0
        for indices in torch.arange(len(test)).split(500):
            _, labels, images = test[indices]
            with torch.no_grad():
                guessed = network(preprocess(images.to(device), mean, std, size)).argmax(1).cpu()
            right += (guessed == labels).sum().item()
        accuracy = right / len(test)
    header = dict(architecture=ARCHITECTURE, settings=ARCHITECTURE_SETTINGS, num_classes=num_classes,
                  input=dict(mean=mean, std=std, input_size=(3, size, size)), classes=data.classes,
                  accuracy=accuracy, trained_on=data.meta["source"], images=len(data), epochs=EPOCHS, seed=SEED,
                  started_from=START_FROM)
    state = {key: value.half().cpu() if value.is_floating_point() else value.cpu()
             for key, value in network.state_dict().items()}
    write_atomically(OUT, lambda path: save_file(state, path, metadata=dict(network=json.dumps(header))))
    said = "no test set" if accuracy is None else f"{accuracy:.2%} of {len(test):,} test images right"
    print(f"{OUT}: {os.path.getsize(OUT) / 1e6:.2f} MB, {said}")


if __name__ == "__main__":
    run_script(main)
