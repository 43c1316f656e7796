"""What the prune-tune loop is compared with, where it is no setting of the same engine."""
