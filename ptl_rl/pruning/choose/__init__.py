"""From scores to what goes."""
