"""Checkpoints, best/, final/ and exports, each whole or not there."""
