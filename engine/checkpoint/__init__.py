"""What is saved and found again: checkpoints, best/, final/ and exports, each whole or not there."""
