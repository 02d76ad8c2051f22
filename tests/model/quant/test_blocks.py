"""Large tensors go through in pieces, and give what one piece gives."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.quant import blocks
from model.quant.fp8 import dequantize_fp8, quantize_fp8
from model.quant.hadamard import hadamard
from model.quant.mxfp4 import dequantize_mxfp4, mxfp4_to_fp8, quantize_mxfp4
from model.quant.qat import fake_quantize_fp8, fake_quantize_mxfp4

OPERATIONS = {
    "quantize_fp8": (lambda x: x, quantize_fp8),
    "dequantize_fp8": (quantize_fp8, lambda q: dequantize_fp8(*q)),
    "quantize_mxfp4": (lambda x: x, quantize_mxfp4),
    "dequantize_mxfp4": (quantize_mxfp4, lambda q: dequantize_mxfp4(*q)),
    "mxfp4_to_fp8": (quantize_mxfp4, lambda q: mxfp4_to_fp8(*q)),
    "fake_quantize_mxfp4": (lambda x: x, fake_quantize_mxfp4),
    "fake_quantize_fp8": (lambda x: x, lambda x: fake_quantize_fp8(x, (128, 128))),
    "hadamard": (lambda x: x, hadamard),
}


class Storages(TorchDispatchMode):
    """Records the size of every storage that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return out


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("shape", [(2048, 2048), (64, 256, 256), (5, 700, 1024)], ids=str)
def test_no_storage_but_the_result_is_larger_than_a_piece(name: str, shape: tuple[int, ...]) -> None:
    prepare, operate = OPERATIONS[name]
    inputs = prepare(torch.randn(shape))
    with Storages() as storages:
        result = operate(inputs)
    for tensor in tree_leaves((inputs, result)):
        storages.sizes.pop(tensor.untyped_storage().data_ptr(), None)
    assert max(storages.sizes.values()) <= 4 * (1 << 19)


@pytest.mark.parametrize("name", [n for n in OPERATIONS if n != "hadamard"])
def test_pieces_give_what_the_whole_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare, operate = OPERATIONS[name]
    inputs = prepare(torch.randn(3, 300, 130, generator=torch.Generator().manual_seed(1)))
    whole = operate(inputs)
    monkeypatch.setattr(blocks, "_CPU_ELEMENTS", 130 * 128)
    for one, other in zip(tree_leaves(whole), tree_leaves(operate(inputs))):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
