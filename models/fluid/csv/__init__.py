"""The CSV files of one simulated or measured case: found, checked and read."""
