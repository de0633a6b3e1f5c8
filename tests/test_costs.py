"""costs.py: what does not fit into a GPU's memory is refused with what does."""

from functools import partial

import pytest
import torch

from costs import check_memory
from model import build


def test_memory_that_a_gpu_lacks_is_refused_with_what_fits(monkeypatch):
    with torch.device("meta"):
        model = build("SiT-XL/2", teacher_dim=None)
    check = partial(check_memory, model, None, None, 256, 1, 1, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 10 * 2**30)
    for free, message in ((80, "MICRO_BATCHES 1: about 84 GiB needed, 80 free on this GPU; set it to 2$"),
                          (24, "set it to 8$"), (12, "set it to 256 and ACTIVATION_CHECKPOINTING to True$")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free * 2**30, free * 2**30))
        with pytest.raises(ValueError, match=message):
            check(torch.device("cuda"))
    assert check(torch.device("cpu")) == pytest.approx(84 * 2**30, rel=0.01)
