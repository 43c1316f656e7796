"""One RL training in which channels are cut between two steps: ``schedule.mode: in_place``.

``cuts`` says what is cut after which step and what a checkpoint must know of it; ``trainer`` is the trainer with cuts
at the end of steps, ``governed`` the one that finds their pace; ``worker`` has a method that cuts the live policy.
"""
