"""What the operating system gives: files, signals, output, processes, devices. Knows nothing of training."""
