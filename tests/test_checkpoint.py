"""Published checkpoints: their layouts load, and no code in them runs."""

import argparse
import re

import pytest
import torch
from safetensors.torch import save_file

import sample
from checkpoint import load_model
from model import build


def test_published_checkpoints_load(tmp_path):
    """The layout of the SiT, REPA and HASTE releases: a state dict, bare or under "ema", with or without projectors."""
    torch.manual_seed(0)
    for name, settings, wrap in (("SiT-S/4", dict(learn_sigma=True, teacher_dim=None), lambda state: state),
                                 ("SiT-S/2", dict(), lambda state: dict(ema=state, steps=400_000))):
        theirs = build(name, **settings)
        torch.save(wrap(theirs.state_dict()), tmp_path / "published.pt")
        ours, found = load_model(tmp_path / "published.pt")
        assert found["PATH"] == "linear" and found["data"]["vae"]["scale"] == 0.18215
        x, t, y = torch.randn(1, 4, 32, 32), torch.rand(1), torch.tensor([1000])
        assert torch.equal(ours(x, t, y)[0], theirs(x, t, y)[0])
        velocity = sample.velocity_of(ours, found, torch.device("cpu"))
        # SiT's own release counts time from noise to data; REPA and HASTE from data to noise, as we do
        expected = -theirs(x, 1 - t, y)[0] if "learn_sigma" in settings else theirs(x, t, y)[0]
        assert torch.equal(velocity(x, t, y), expected)


def test_published_jits_load_with_either_average(tmp_path):
    """The layout of the JiT release, whose names begin with net. and whose image is 16 x 16 patches."""
    torch.manual_seed(0)
    averages = [build("JiT-T/4", patch_size=32, input_size=512, teacher_dim=None).eval() for _ in range(2)]
    for theirs in averages:
        torch.nn.init.normal_(theirs.final_layer.linear.weight)
    saved = dict(epoch=3, args=argparse.Namespace(model="JiT-B/32"), optimizer=dict(state={}), model={})
    saved |= {f"model_ema{i + 1}": {f"net.{key}": value for key, value in theirs.state_dict().items()}
              for i, theirs in enumerate(averages)}
    torch.save(saved, tmp_path / "checkpoint-last.pth")
    x, t, y = torch.randn(1, 3, 512, 512), torch.rand(1), torch.tensor([1000])
    for average, theirs in ((None, averages[0]), ("model_ema2", averages[1])):
        ours, found = load_model(tmp_path / "checkpoint-last.pth", average)
        assert found["NOISE_SCALE"] == 2 and found["data"]["vae"] is None and ours.in_context_start == 2
        assert torch.equal(ours(x, t, y)[0], theirs(x, t, y)[0])


class Innocent:
    def __reduce__(self):
        return (print, ("code from a checkpoint ran",))


def test_a_published_files_namespace_is_let_in_and_nothing_else(tmp_path, capsys):
    """As REPA and HASTE save them: model, ema, opt, args and steps, projectors for one or several teachers."""
    theirs = build("SiT-S/2", qk_norm=True)
    state = {**theirs.state_dict(), **{f"projectors.1.{i}.bias": torch.zeros(3) for i in (0, 2, 4)}}
    whole = dict(model=state, ema=state, opt=dict(state={}), args=argparse.Namespace(cfg_prob=0.1), steps=400_000)
    torch.save(whole, tmp_path / "published.pt")
    ours, _ = load_model(tmp_path / "published.pt")
    x, t, y = torch.randn(1, 4, 32, 32), torch.rand(1), torch.tensor([3])
    assert torch.equal(ours(x, t, y)[0], theirs(x, t, y)[0])
    older = {re.sub(r"^blocks\.(8|9|10|11)\.", lambda found: f"decoder_blocks.{int(found[1]) - 8}.", key): value
             for key, value in state.items()}
    torch.save(dict(ema=older), tmp_path / "older.pt")
    assert torch.equal(load_model(tmp_path / "older.pt")[0](x, t, y)[0], theirs(x, t, y)[0])
    torch.save(dict(whole, args=Innocent()), tmp_path / "strange.pt")
    with pytest.raises(ValueError, match="strange.pt: not a SiT checkpoint, or damaged"):
        load_model(tmp_path / "strange.pt")
    assert "code from" not in capsys.readouterr().out
    torch.save(dict(ema=dict(state, **{"blocks.0.extra": torch.zeros(1), "head.bias": torch.zeros(1)})),
               tmp_path / "more.pt")
    with pytest.raises(ValueError, match=r"more.pt: .*unexpected keys blocks\.0\.extra, head\.bias\); set"):
        load_model(tmp_path / "more.pt")
    torch.save({"conv1.weight": torch.zeros(1), "bn.bias": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt: .*unexpected keys bn\.bias, conv1\.weight\); set"):
        load_model(tmp_path / "other.pt")


@pytest.mark.parametrize("form", ["module.", "_orig_mod.", "module._orig_mod.", "old format", "folder"])
def test_checkpoints_as_people_have_them(tmp_path, form):
    """With DDP's and torch.compile's prefixes, in the old torch.save format, by the folder of ema.safetensors."""
    torch.manual_seed(0)
    theirs = build("SiT-S/8", teacher_dim=None)
    state, path = theirs.state_dict(), tmp_path / "x.pt"
    if form == "folder":
        path = tmp_path
        save_file(state, tmp_path / "ema.safetensors")
    elif form == "old format":
        torch.save(dict(ema=state), path, _use_new_zipfile_serialization=False)
    else:
        torch.save(dict(ema={form + key: value for key, value in state.items()}), path)
    assert all(torch.equal(value, state[key]) for key, value in load_model(path)[0].state_dict().items())


def test_dits_weights_are_not_taken_for_sits(tmp_path):
    torch.save(build("SiT-S/8", learn_sigma=True, teacher_dim=None).state_dict(), tmp_path / "DiT-XL-2-256x256.pt")
    with pytest.raises(ValueError, match="DiT predicts noise, not a velocity"):
        load_model(tmp_path / "DiT-XL-2-256x256.pt")
