"""The hot paths: attention, masked squared errors and the loss of a language model's head. Knows nothing above tensors.

from kernels import flash_attention, packed_attention, masked_mse, linear_masked_mse, linear_cross_entropy
"""

from kernels.flash_attention import flash_attention
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.linear_masked_mse import linear_masked_mse
from kernels.masked_mse import masked_mse
from kernels.packed_attention import packed_attention, packing_tables

__all__ = [
    "flash_attention",
    "linear_cross_entropy",
    "linear_masked_mse",
    "masked_mse",
    "packed_attention",
    "packing_tables",
]
