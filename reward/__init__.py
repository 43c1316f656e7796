"""Reward functions with verl's signature: one idea a file, usable in stock verl without the rest of ptl-rl.

Nothing here imports ptl_rl, torch, ray or verl. Import the submodules themselves: importing the package
does no work.
"""
