"""Running out of memory, and going on with smaller micro-batches."""
