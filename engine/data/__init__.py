"""From (seed, epoch) to batches: the order of samples, randomness, and loading."""
