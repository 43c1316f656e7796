"""Scoring, choosing, compensating and slicing: one cut of one model, by ranks or in one process."""
