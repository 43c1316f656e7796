"""One training in which channels and blocks are cut between two steps: ``schedule.mode: in_place``.

``cuts`` says what is cut after which step and what a checkpoint must know of it; ``making`` has what every trainer does
beside training: the cuts, and a sliced model to go on with, whose place ``shapes`` keeps. ``trainer`` is the RL trainer
with cuts at the end of steps, ``governed`` the one that finds their pace (by ``governor``), ``supervised`` the trainer
of CPT; ``worker`` has the methods that score, cut and slice the live policy. ``finish`` makes the checkpoint of it all.
"""
