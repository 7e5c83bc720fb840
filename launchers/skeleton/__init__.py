"""A workload of Trunkline."""
