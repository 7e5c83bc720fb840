"""The processes of a run: who they are, what they agree on, and whether one of them hangs."""
