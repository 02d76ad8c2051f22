"""An accelerator gives the same bytes as a CPU."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves

from model.quant.fp8 import dequantize_fp8, quantize_fp8
from model.quant.hadamard import hadamard
from model.quant.kv import pack_kv, unpack_kv
from model.quant.mxfp4 import dequantize_mxfp4, mxfp4_to_fp8, quantize_mxfp4
from model.quant.qat import fake_quantize_fp8, fake_quantize_index, fake_quantize_kv, fake_quantize_mxfp4

OPERATIONS = {
    "fp8": lambda x: (*quantize_fp8(x), dequantize_fp8(*quantize_fp8(x)), dequantize_fp8(*quantize_fp8(x), dtype=torch.bfloat16)),
    "fp8-rows": lambda x: (*quantize_fp8(x, (1, 128), floor=1e-4), fake_quantize_fp8(x)),
    "mxfp4": lambda x: (*quantize_mxfp4(x), dequantize_mxfp4(*quantize_mxfp4(x)), fake_quantize_mxfp4(x)),
    "to-fp8": lambda x: mxfp4_to_fp8(*quantize_mxfp4(x.clamp(-1000, 1000).add(2000))),
    "kv": lambda x: (pack_kv(x, rope_dims=64), unpack_kv(pack_kv(x, rope_dims=64), 512, rope_dims=64), fake_quantize_kv(x)),
    "index": lambda x: (hadamard(x), fake_quantize_index(x)),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_bytes_do_not_depend_on_the_device(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 300, 512, generator=generator) * 2.0 ** torch.randint(-30, 30, (3, 300, 512), generator=generator)
    x[0, 0] *= 2.0**-110  # down to subnormal numbers
    x = x.to(dtype)
    for here, there in zip(tree_leaves(OPERATIONS[name](x)), tree_leaves(OPERATIONS[name](x.cuda()))):
        assert torch.equal(here.view(torch.uint8), there.cpu().view(torch.uint8))
