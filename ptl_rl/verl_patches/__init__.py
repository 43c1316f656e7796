"""What is patched in verl and lm-eval on every device, one function a patch. ``docs/patches.md`` lists them all."""
