"""losses.py: the reference's numbers, at 256 tokens the published call's, pieces at 1,024, iREPA's normalisation."""

import numpy as np
import pytest
import timm
import torch

import train
from losses import attention_loss, attention_loss_of_qk, feature_loss, normalize_over_tokens
from model import attention_logits, build, interpolate
from teacher import Teacher
from tests.test_model import ShapeRecorder


def test_losses_equal_the_reference(golden):
    z, _, meta = golden("haste_loss")
    for path in ("linear", "cosine"):
        x_t, velocity = interpolate(z["x"], z["noise"], z["t"], path)
        torch.testing.assert_close(x_t, z[f"{path}_x_t"], rtol=meta["rtol"], atol=1e-6)
        torch.testing.assert_close(velocity, z[f"{path}_velocity"], rtol=meta["rtol"], atol=1e-6)
        loss = torch.nn.functional.mse_loss(z["vp"], velocity)
        torch.testing.assert_close(loss, z[f"{path}_denoising_loss"], rtol=meta["rtol"], atol=0)
    loss = attention_loss(list(z["student_logits"]), list(z["teacher_logits"]))
    torch.testing.assert_close(loss, z["attention_loss"], rtol=meta["rtol"], atol=0)
    loss = feature_loss(z["student_features"], z["teacher_features"])
    torch.testing.assert_close(loss, z["feature_loss"], rtol=meta["rtol"], atol=1e-7)


def test_losses_equal_the_published_call_at_256_tokens(golden):
    z, _, meta = golden("haste_loss256")
    tolerance = dict(rtol=meta["rtol"], atol=meta["atol"])
    for path in ("linear", "cosine"):
        x_t, velocity = interpolate(z["x"], z["noise"], z[f"{path}_t"], path)
        torch.testing.assert_close(x_t, z[f"{path}_x_t"], **tolerance)
        torch.testing.assert_close(velocity, z[f"{path}_velocity"], **tolerance)
    q, k = z["student_q"].float().requires_grad_(), z["student_k"].float().requires_grad_()
    scale = q.shape[-1] ** -0.5
    student = [(a * scale) @ b.mT for a, b in zip(q, k)]
    teacher = [(a * scale) @ b.mT for a, b in zip(z["teacher_q"].float(), z["teacher_k"].float())]
    loss = attention_loss(student, teacher)
    torch.testing.assert_close(loss, z["attention_loss"], **tolerance)
    torch.testing.assert_close(loss.double(), z["attention_loss_float64"], rtol=1e-5, atol=0)
    assert loss > z["teacher_entropy"]
    loss.backward()
    torch.testing.assert_close(q.grad[0, :, 0], z["attention_grad_q"], **tolerance)
    torch.testing.assert_close(k.grad[0, :, 0], z["attention_grad_k"], **tolerance)
    assert not q.grad[:, :, 12:].any()  # heads without a partner
    loss = feature_loss(z["student_features"].float(), z["teacher_features"].float())
    torch.testing.assert_close(loss, z["feature_loss"], **tolerance)


def test_irepas_normalisation_and_losses_equal_the_reference(golden, monkeypatch):
    z, _, meta = golden("irepa")
    allowed = meta["tolerance"]
    for gamma in ("0.6", "0.8", "1.0"):
        for key, tokens in (("normalised", z["teacher"]), ("normalised_edge", z["edge"])):
            torch.testing.assert_close(normalize_over_tokens(tokens, float(gamma)), z[f"{key}/{gamma}"],
                                       rtol=allowed["normalised"], atol=allowed["normalised"])
        monkeypatch.setattr(train, "SPATIAL_NORM", float(gamma))
        for kernel in (3, 1):
            feature, attention = train.alignment_losses(z[f"projected/{kernel}"], [], z["teacher"], [])
            torch.testing.assert_close(feature, z[f"loss/{kernel}/{gamma}"], rtol=allowed["loss"], atol=allowed["loss"])
    monkeypatch.setattr(train, "SPATIAL_NORM", 0.0)
    feature, _ = train.alignment_losses(z["projected/3"], [], z["teacher"], [])
    torch.testing.assert_close(feature, z["loss/3/plain"], rtol=allowed["loss"], atol=allowed["loss"])


def test_at_1024_tokens_loss_grid_and_table_are_right():
    """512 x 512 pixels: logits in pieces of 256 rows, a teacher at 448 pixels for DINOv2's patch, a 32 x 32 table."""
    torch.manual_seed(0)
    student, teacher = ([[each.requires_grad_() for each in torch.randn(2, 2, heads, 1024, 8)] for _ in range(2)]
                        for heads in (3, 2))
    gradients, losses = [], []
    for pieces in (False, True):
        with ShapeRecorder() as recorder:
            loss = attention_loss_of_qk(student, teacher) if pieces else attention_loss(
                *([attention_logits(q, k) for q, k in each] for each in (student, teacher)))
            gradients.append(torch.autograd.grad(loss, [each for pair in student for each in pair]))
        losses.append(loss)
        assert any(np.prod(shape) == 2 * 2 * 1024**2 for shape in recorder.shapes) != pieces
    torch.testing.assert_close(*losses)
    for whole, in_pieces in zip(*gradients):
        torch.testing.assert_close(in_pieces, whole, rtol=1e-4, atol=1e-8)

    with torch.device("meta"):
        model = build("SiT-XL/2", input_size=64, teacher_dim=None)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 674_816_272
    assert model.pos_embed.shape == (1, 1024, 1152) and model.grid == 32
    small = build("SiT-T/4", input_size=128)
    table = small.pos_embed.unflatten(1, (32, 32))
    torch.testing.assert_close(table[:, :16, :16].flatten(1, 2), build("SiT-T/4", input_size=64).pos_embed)
    network = timm.create_model("vit_tiny_patch16_224", patch_size=14, embed_dim=32, depth=2, num_heads=2)
    ours = Teacher(network, [1], 32 * 14, pretrained=False)
    tokens, (logits,) = ours(torch.zeros(1, 3, 512, 512, dtype=torch.uint8))
    assert ours.input_size == 448 and tokens.shape == (1, 1024, 32) and logits.shape == (1, 2, 1024, 1024)


def test_losses_refuse_grids_that_do_not_match():
    with pytest.raises(ValueError, match=r"\[1, 2, 9, 9\] and teacher attention \[1, 2, 16, 16\] do not match; "
                                         r"run the"):
        attention_loss([torch.zeros(1, 2, 9, 9)], [torch.zeros(1, 2, 16, 16)])
    with pytest.raises(ValueError, match=r"\[1, 9, 4\] and teacher tokens \[1, 16, 4\] do not match; run the teacher"):
        feature_loss(torch.zeros(1, 9, 4), torch.zeros(1, 16, 4))
