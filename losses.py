"""What alignment is: feature loss (REPA), attention loss (HASTE), with or without N x N tensors,
and iREPA's normalisation over tokens; for any training loop.

    loss = denoising + 0.5 * feature_loss(features, teacher_tokens) + 0.5 * attention_loss(logits, teacher_logits)
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from model import attention_logits


def feature_loss(student_tokens, teacher_tokens):
    """Minus the cosine similarity of tokens [B, N, D], mean over tokens and batch (REPA, arXiv 2410.06940)."""
    if student_tokens.shape != teacher_tokens.shape:
        raise ValueError(f"student features {list(student_tokens.shape)} and teacher tokens "
                         f"{list(teacher_tokens.shape)} do not match; run the teacher at the "
                         "student's grid times its patch size")
    student = F.normalize(student_tokens.float(), dim=-1)
    teacher = F.normalize(teacher_tokens.float(), dim=-1)
    return -(student * teacher).sum(dim=-1).mean()


def normalize_over_tokens(tokens, gamma):
    """Teacher tokens [B, N, D] less gamma times their mean over each image, by their standard deviation there: what is
    left says where in the image something is, more than what the image shows (iREPA, arXiv 2512.10794)."""
    tokens = tokens.float()
    return (tokens - gamma * tokens.mean(dim=1, keepdim=True)) / (tokens.std(dim=1, keepdim=True) + 1e-6)


def attention_loss(student_logits, teacher_logits):
    """Cross-entropy of the student's attention rows against the teacher's: mean over rows, heads, batch, layer pairs.

    Lists of pre-softmax logits [B, heads, N, N], one per pair. Of unequal head counts the first
    min(Hs, Ht) are paired. HASTE, arXiv 2505.16792; computed in float32.
    """
    losses = []
    for student, teacher in zip(student_logits, teacher_logits, strict=True):
        if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
            raise ValueError(f"student attention {list(student.shape)} and teacher attention {list(teacher.shape)} do "
                             f"not match; run the teacher at the student's grid times its patch size")
        heads = min(student.shape[1], teacher.shape[1])
        rows = student[:, :heads].float()  # [B, heads, N, N]
        targets = teacher[:, :heads].float().softmax(dim=-1)
        losses.append(F.cross_entropy(rows.flatten(0, 2), targets.flatten(0, 2)))
    return torch.stack(losses).mean()


def attention_loss_of_qk(student, teacher):
    """attention_loss of the logits that (queries, keys), each [B, heads, N, head dim], make: two lists of such pairs.

    Logits exist for paired heads alone, beside the fused attention: at 256 tokens as fast on a CPU as attending with
    them. Above, they are made 256 rows at a time, and again in the backward pass, so that no [N, N] tensor is kept.
    """
    def of_rows(q, k, teacher_q, teacher_k):
        return attention_loss([attention_logits(q, k)], [attention_logits(teacher_q, teacher_k)])

    losses = []
    for (q, k), (teacher_q, teacher_k) in zip(student, teacher, strict=True):
        heads = min(q.shape[1], teacher_q.shape[1])
        q, k, teacher_q, teacher_k = (each[:, :heads] for each in (q, k, teacher_q, teacher_k))
        N = q.shape[2]
        loss_of = of_rows if N <= 256 else partial(checkpoint, of_rows, use_reentrant=False)
        pieces = zip(q.split(256, dim=2), teacher_q.split(256, dim=2))
        losses.append(sum(rows.shape[2] / N * loss_of(rows, k, targets, teacher_k) for rows, targets in pieces))
    return torch.stack(losses).mean()


def sums_by_time(losses, t):
    """Of images at times t [B] the sum of their losses [B] and their number in each tenth of 0..1, [2, 10]; by a table
    of all pairs, as it takes neither a wait for the GPU nor sums in an order that changes."""
    inside = (10 * t).long().clamp(max=9) == torch.arange(10, device=t.device)[:, None]  # [10, B]
    return torch.stack([(inside * losses).sum(dim=1), inside.sum(dim=1)])
