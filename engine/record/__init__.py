"""What a run leaves for a person to read: its folder, metrics, trackers and report."""
