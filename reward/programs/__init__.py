"""The code reward: Python programs against unit tests, in confined processes. ``reward.py`` is what a recipe names."""
