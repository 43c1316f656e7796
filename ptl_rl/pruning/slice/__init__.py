"""Apply a plan to a checkpoint on disk, and hold the result against the masked original."""
