"""A scale-out training engine: DeepSpeed ZeRO first, FSDP2 as the fallback, Triton on the hot paths."""
