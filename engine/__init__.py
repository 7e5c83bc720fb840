"""The training engine: one loop, its backends, checkpoints and configuration. Knows no workload."""
