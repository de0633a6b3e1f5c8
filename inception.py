"""The FID Inception: Google's Inception v3 of 2015-12-05 (arXiv 1512.00567), parameter names as in torchvision."""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")

average_pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)  # as in TensorFlow
max_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
halving_pool = partial(F.max_pool2d, kernel_size=3, stride=2)


class Conv(nn.Module):
    """Convolution, batch norm, ReLU; padding "same" or "valid" as TensorFlow calls it."""

    def __init__(self, in_channels, out_channels, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches of convolutions on the same input, concatenated; the pool runs first in the one called branch_pool. A
    branch is a list of layers, (out_channels, kernel, ...) as Conv takes them, or of a fork, itself a list of two."""

    def __init__(self, channels, pool, **branches):
        super().__init__()
        self.pool, self.branches = pool, {branch: [] for branch in branches}
        for branch, layers in branches.items():
            width = channels
            for i, layer in enumerate(layers, start=1):
                name = branch if len(layers) == 1 else f"{branch}_{i}"
                fork = {name + "a": layer[0], name + "b": layer[1]} if isinstance(layer, list) else {name: layer}
                for key, arguments in fork.items():
                    self.add_module(key, Conv(width, *arguments))
                width = arguments[0]
                self.branches[branch].append(list(fork))

    def forward(self, x):
        outputs = []
        for branch, layers in self.branches.items():
            ys = [self.pool(x) if branch == "branch_pool" else x]
            for names in layers:
                ys = [getattr(self, name)(ys[0]) for name in names]
            outputs += ys
        return torch.cat(outputs, dim=1)


def resize_tf1(x, size):
    """TensorFlow 1's bilinear resize of [B, C, H, W] to size x size: output i reads input i * n /
    size, without the half pixel that every later resize adds. ADM's graph begins with it."""
    for dim in (3, 2):
        n = x.shape[dim]
        position = torch.arange(size, dtype=torch.float32, device=x.device) * (n / size)
        low = position.long()
        fraction = (position - low).view(-1, *[1] * (3 - dim))
        x_low, x_high = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1))
        x = x_low + (x_high - x_low) * fraction
    return x


class InceptionV3(nn.Module):
    """The network behind FID, sFID and IS, with the parameters of INCEPTION_URL's file, in eval mode.

    resize="tf1": TensorFlow 1's resize to 299, (x - 128) / 128, logits without bias, as in ADM's graph.
    resize="bilinear": half-pixel bilinear resize of x / 255 to 299, 2 x - 1, logits with bias, as in pytorch-fid."""

    def __init__(self, resize="tf1"):
        super().__init__()
        assert resize in ("tf1", "bilinear")
        self.resize = resize
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, 3, 2, "valid"), Conv(32, 32, 3, 1, "valid")
        self.Conv2d_2b_3x3, self.Conv2d_3b_1x1 = Conv(32, 64, 3), Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, 1, "valid")
        for name, channels, c in (("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)):
            self.add_module(name, Mixed(channels, average_pool, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                                        branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(c, 1)]))
        self.Mixed_6a = Mixed(288, halving_pool, branch3x3=[(384, 3, 2, "valid")],
                              branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2, "valid")], branch_pool=[])
        row, column = (1, 7), (7, 1)  # 7x7 kernels, taken apart
        for name, c in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            self.add_module(name, Mixed(
                768, average_pool, branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, row), (192, column)],
                branch7x7dbl=[(c, 1), (c, column), (c, row), (c, column), (192, row)], branch_pool=[(192, 1)]))
        self.Mixed_7a = Mixed(768, halving_pool, branch3x3=[(192, 1), (320, 3, 2, "valid")],
                              branch7x7x3=[(192, 1), (192, row), (192, column), (192, 3, 2, "valid")], branch_pool=[])
        fork = [(384, (1, 3)), (384, (3, 1))]
        # the max pool in 7c alone is the 2015 graph's own oddity
        for name, channels, pool in (("Mixed_7b", 1280, average_pool), ("Mixed_7c", 2048, max_pool)):
            self.add_module(name, Mixed(channels, pool, branch1x1=[(320, 1)], branch3x3=[(384, 1), fork],
                                        branch3x3dbl=[(448, 1), (384, 3), fork], branch_pool=[(192, 1)]))
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # on a CPU 1.5 times as fast

    @torch.no_grad()
    def forward(self, images):
        """images uint8 [B, 3, H, W] to (pool [B, 2048], spatial [B, 2023], probs [B, 1008]), float32.

        spatial: the first 7 channels of Mixed_6d's 1x1 branch, flattened H-W-C, the order of ADM's mu_s, sigma_s."""
        if self.resize == "tf1":
            x = (resize_tf1(images.float(), 299) - 128) / 128
        else:
            x = 2 * F.interpolate(images.float() / 255, (299, 299), mode="bilinear", align_corners=False) - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halving_pool(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(halving_pool(x))))  # [B, 288, 35, 35]
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # [B, 768, 17, 17], the 1x1 branch first
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        pool = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x)))).mean(dim=(2, 3))
        logits = F.linear(pool, self.fc.weight, None if self.resize == "tf1" else self.fc.bias)
        return pool, spatial, logits.softmax(dim=1)


def load_inception(weights, resize):
    """(InceptionV3(resize), its weights' path): of the file `weights`, or with None INCEPTION_URL's, fetched once into
    torch.hub's cache and checked against its hash. Raises ValueError for what cannot be fetched or read."""
    path = Path(weights or Path(torch.hub.get_dir(), "checkpoints", Path(INCEPTION_URL).name))
    try:
        if weights:
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            state = torch.hub.load_state_dict_from_url(INCEPTION_URL, map_location="cpu", check_hash=True,
                                                       weights_only=True)
        network = InceptionV3(resize)
        network.load_state_dict(state)
        return network, path
    except Exception as error:  # network, zip, unpickler and state dict each raise their own; one sentence serves all
        found = "damaged, or of another network" if path.exists() else "no such file, nor could it be fetched"
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"{path}: {found} ({reason}); put a copy of {INCEPTION_URL} there, or set "
                         f"INCEPTION_WEIGHTS to the path of one") from error
