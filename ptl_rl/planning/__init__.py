"""What a run will need before anything is rented: memory, disk, hours and their price, by arithmetic.

Nothing here imports torch or ray, or reads weights. ``docs/plan.md`` says what is counted.
"""
