"""Entry point of group ``verl.plugins``: verl imports this module at the end of ``import verl``, in every process."""

from ptl_rl.baselines import slicegpt

slicegpt.register()
