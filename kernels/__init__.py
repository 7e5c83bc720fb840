"""The hot paths: attention and masked squared errors. Knows nothing above tensors.

from kernels import flash_attention, masked_mse, linear_masked_mse
"""

from kernels.flash_attention import flash_attention
from kernels.linear_masked_mse import linear_masked_mse
from kernels.masked_mse import masked_mse

__all__ = ["flash_attention", "linear_masked_mse", "masked_mse"]
