"""The state of a run in one form for every backend, ZeRO stage and number of ranks."""
