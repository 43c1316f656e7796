"""What is patched in verl and lm-eval on every device, one function a patch. ``docs/patches.md`` lists them all."""

ENGINE_LIBRARY = "ptl_rl.verl_patches.engine"
"""The module by the name that verl's workers import it by; it is heavy, and importing it patches."""
