"""Attention over long sequences, in Triton: `from trunkline.kernels.attention import flash_attention`."""

from trunkline.kernels.attention.flash import flash_attention
from trunkline.kernels.attention.packed import packed_attention, packing_tables

__all__ = ["flash_attention", "packed_attention", "packing_tables"]
