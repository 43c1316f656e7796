"""What verl needs on a CPU and has no registration hook for.

Each function is one such need, says which versions have it, and has a unit test that fails once
upstream makes it needless.
"""

import functools
import os
from importlib.metadata import version

from packaging.specifiers import SpecifierSet

SUPPORTED_VERL = SpecifierSet(">=0.9.1,<0.10")


def apply() -> None:
    """Apply everything in this module.

    Raises:
        RuntimeError: verl's version is not one that this module was written for.
    """
    check_version()
    use_cuda_engines()
    name_gloo_once()


def check_version() -> None:
    """Raises RuntimeError if verl's version is not one that its patches were written for."""
    verl_version = version("verl")
    if verl_version not in SUPPORTED_VERL:
        raise RuntimeError(f"ptl_rl supports verl {SUPPORTED_VERL}, found {verl_version}")


def use_cuda_engines() -> None:
    """Let verl find its FSDP engines, which it registers for cuda and npu only (verl 0.9).

    Their code is device-agnostic. `VERL_ENGINE_DEVICE` is verl's own override for the lookup.
    Registering the classes for cpu instead would import every engine at `import verl`.
    """
    os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")


def name_gloo_once() -> None:
    """Make the default process group backend "cpu:gloo" (verl 0.9, torch 2.13).

    verl composes "cpu:gloo,<device>:<backend>"; with a CPU device torch refuses the result as a
    duplicate device type. The function takes a backend as its argument, only its caller in the
    engine worker does not pass any, so this supplies the default.
    """
    from verl.utils import distributed

    original = distributed.initialize_global_process_group_ray
    if getattr(original, "names_gloo_once", False):
        return

    @functools.wraps(original)
    def initialize_global_process_group_ray(timeout_second=None, backend=None):
        return original(timeout_second=timeout_second, backend=backend or "cpu:gloo")

    initialize_global_process_group_ray.names_gloo_once = True  # type: ignore[attr-defined]
    distributed.initialize_global_process_group_ray = initialize_global_process_group_ray
