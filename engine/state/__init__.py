"""The state of a run, in one form for every layout."""
