"""The stage ``recover`` with on-policy distillation from the unpruned parent.

verl's RL trainer runs it: the policy's rollouts are what is learned on, and a vLLM server of the parent says what it
would have written at every token of them. :mod:`ptl_rl.recovery.verl_config` renders its settings.
"""

from ptl_rl.recovery.grpo import recover

__all__ = ["recover"]
