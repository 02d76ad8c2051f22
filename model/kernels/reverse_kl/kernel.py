"""One program a row: two passes over the student's and the teacher's logits."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)
"""Stands for the logits beyond the vocabulary: finite, so that differences of two of them are numbers."""


@triton.jit
def reverse_kl_rows(student, teacher, weights, kl, vocabulary, student_stride, teacher_stride, WRITE: tl.constexpr,
                    BLOCK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """KL(p || q) = E_p[z - y] - (lse z - lse y) of logits z, y; gradient w p (z - y - (lse z - lse y) - KL), written over z."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    lanes = tl.arange(0, BLOCK)
    top_p, top_q = float("-inf"), float("-inf")
    total_p, total_q, moment = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
        inside = start + lanes < vocabulary
        z = tl.load(student + start + lanes, inside, LOWEST).to(tl.float32)
        y = tl.load(teacher + start + lanes, inside, LOWEST).to(tl.float32)
        new_p, new_q = tl.maximum(top_p, tl.max(z, 0)), tl.maximum(top_q, tl.max(y, 0))
        shrink = tl.exp2((top_p - new_p) * LOG2E)
        p = tl.exp2(z * LOG2E - new_p * LOG2E)
        total_p = total_p * shrink + p
        moment = moment * shrink + p * (z - y)
        total_q = total_q * tl.exp2((top_q - new_q) * LOG2E) + tl.exp2(y * LOG2E - new_q * LOG2E)
        top_p, top_q = new_p, new_q
    sum_p = tl.sum(total_p, 0)
    lse_p = top_p + tl.log(sum_p)
    shift = lse_p - (top_q + tl.log(tl.sum(total_q, 0)))
    value = tl.sum(moment, 0) / sum_p - shift
    tl.store(kl + row, value)
    if WRITE:
        weight = tl.load(weights + row)
        blocks = tl.cdiv(vocabulary, BLOCK)
        for back in tl.range(0, blocks, num_stages=STAGES):  # from the end, which is still in the cache
            columns = (blocks - 1 - back) * BLOCK + lanes
            inside = columns < vocabulary
            z = tl.load(student + columns, inside, LOWEST).to(tl.float32)
            y = tl.load(teacher + columns, inside, LOWEST).to(tl.float32)
            gradient = weight * tl.exp2(z * LOG2E - lse_p * LOG2E) * (z - y - (shift + value))
            tl.store(student + columns, gradient.to(student.dtype.element_ty), inside)
