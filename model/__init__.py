"""The DeepSeek-V4 architecture in plain PyTorch, under the names of the release.

One alphabet for shapes: `B` rows of a decoding batch, `T` tokens of a packed row, `N` samples in it, `L` layers, `D` model width,
`H` heads, `K` head width, `C` compressed entries, `E` experts, `A` active experts, `F` expert width, `M` residual streams, `V` vocabulary.
"""
