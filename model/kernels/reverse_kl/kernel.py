"""One program a row: two passes over the student's and the teacher's logits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def reverse_kl_rows(
    student, teacher, weights, kl, vocabulary, student_stride, teacher_stride, WRITE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """KL(p || q) = E_p[z - y] - (lse z - lse y) of logits z, y; gradient w p (z - y - (lse z - lse y) - KL), written over z."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    lanes = tl.arange(0, BLOCK)
    top_p, top_q = float("-inf"), float("-inf")
    total_p, total_q, moment = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        inside = start + lanes < vocabulary
        z = tl.load(student + start + lanes, inside, float("-inf")).to(tl.float32)
        y = tl.load(teacher + start + lanes, inside, float("-inf")).to(tl.float32)
        new_p, new_q = tl.maximum(top_p, tl.max(z, 0)), tl.maximum(top_q, tl.max(y, 0))
        shrink = tl.exp(top_p - new_p)
        p = tl.exp(z - new_p)
        total_p = total_p * shrink + p
        moment = moment * shrink + p * tl.where(inside, z - y, 0.0)
        total_q = total_q * tl.exp(top_q - new_q) + tl.exp(y - new_q)
        top_p, top_q = new_p, new_q
    sum_p = tl.sum(total_p, 0)
    lse_p = top_p + tl.log(sum_p)
    shift = lse_p - (top_q + tl.log(tl.sum(total_q, 0)))
    value = tl.sum(moment, 0) / sum_p - shift
    tl.store(kl + row, value)
    if WRITE:
        weight = tl.load(weights + row)
        blocks = tl.cdiv(vocabulary, BLOCK)
        for back in range(0, blocks):  # from the end, which is still in the cache
            columns = (blocks - 1 - back) * BLOCK + lanes
            inside = columns < vocabulary
            z = tl.load(student + columns, inside, float("-inf")).to(tl.float32)
            y = tl.load(teacher + columns, inside, 0.0).to(tl.float32)
            gradient = weight * tl.exp(z - lse_p) * (tl.where(inside, z - y, 0.0) - shift - value)
            tl.store(student + columns, gradient.to(student.dtype.element_ty), inside)
