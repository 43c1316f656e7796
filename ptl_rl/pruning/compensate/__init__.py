"""What stays takes over, in closed form, what goes."""
