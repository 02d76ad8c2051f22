"""The low-precision formats of the release: FP8 and MXFP4 with power-of-two block scales, the key-value row, and training on their grids.

`fp8`, `mxfp4` and `kv` turn tensors into bytes and back; `qat` puts tensors on the same grids with a straight-through gradient; `grid` and
`blocks` are what they share. Bytes that are to be kept (`quantize_*`) refuse numbers that are not finite; everything that may run in a
forward pass (`dequantize_*`, `pack_kv`, `fake_*`) makes the whole block NaN instead, which needs no wait for the device.
"""
