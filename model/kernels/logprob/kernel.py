"""Statistics of rows of logits in one pass, and the gradient of the chosen tokens' log-probabilities."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def token_statistics(logits, targets, logprobs, entropy, lse, vocabulary, stride, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """log p_t = z_t - lse z and H = lse z - E_p[z], one program a row."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    lanes = tl.arange(0, BLOCK)
    top = float("-inf")
    total, moment = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
        inside = start + lanes < vocabulary
        z = tl.load(logits + start + lanes, inside, float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(z, 0))
        shrink = tl.exp(top - new_top)
        p = tl.exp(z - new_top)
        total = total * shrink + p
        moment = moment * shrink + p * tl.where(inside, z, 0.0)
        top = new_top
    mass = tl.sum(total, 0)
    all_lse = top + tl.log(mass)
    chosen = tl.load(logits + tl.load(targets + row)).to(tl.float32)
    tl.store(logprobs + row, chosen - all_lse)
    tl.store(entropy + row, all_lse - tl.sum(moment, 0) / mass)
    tl.store(lse + row, all_lse)


@triton.jit
def token_gradients(logits, targets, lse, grad, out, vocabulary, stride, BLOCK: tl.constexpr):
    """out_v = g (1[v = t] - p_v), one program a block of a row; `out` has the rows of `logits`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    z = tl.load(logits + row * stride + columns, inside, float("-inf")).to(tl.float32)
    target, weight = tl.load(targets + row), tl.load(grad + row)
    hit = tl.where(columns == target, 1.0, 0.0)
    gradient = weight * (hit - tl.exp(z - tl.load(lse + row)))
    tl.store(out + row * stride + columns, gradient.to(out.dtype.element_ty), inside)
