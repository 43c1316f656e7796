"""What makes verl and transformers quicker to import, in every process of a stage and on the command line.

Ray calls :func:`prepare` in each worker before it imports anything (``worker_process_setup_hook``). A stage of GRPO has
about ten processes that import verl, and each takes seconds for it.
"""

import gc
import sys
from importlib.abc import MetaPathFinder


class _NoScipy(MetaPathFinder):
    """Has scikit-learn and scipy left out where transformers and vLLM take them along; others may still import them.

    What transformers does with them, object detection say, is not there in this process.
    """

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "transformers.generation.candidate_generator":
            sys.modules["transformers.utils"].is_sklearn_available = lambda: False  # type: ignore[attr-defined]
        elif fullname == "transformers.loss.loss_utils":
            sys.modules["transformers.utils"].is_scipy_available = lambda: False  # type: ignore[attr-defined]
        elif fullname == "scipy.signal" and self._is_for_audio():
            raise ModuleNotFoundError("left out, see ptl_rl.verl_patches.quick_imports", name=fullname)
        return None  # modules are not this finder's business

    @staticmethod
    def _is_for_audio() -> bool:
        """Whether the statement that is being carried out, in this thread, stands in vLLM's audio module."""
        frame = sys._getframe(2)
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("importlib"):
            frame = frame.f_back
        return frame.f_globals.get("__name__") == "vllm.multimodal.audio"


def leave_out_scipy() -> None:
    """transformers 5 imports scikit-learn, with scipy and pandas, for one way of speculative decoding, and scipy for
    object detection; vLLM imports scipy for audio, and does with a placeholder where it is missing. lm-eval installs
    both packages.
    """
    if not any(isinstance(finder, _NoScipy) for finder in sys.meta_path):
        sys.meta_path.insert(0, _NoScipy())


def leave_out_ascend_transfer() -> None:
    """verl 0.9 imports vLLM for the weight transfer of Ascend NPUs, wherever a rollout or a trainer is at work.

    It takes a module that does not import for a missing dependency, and says so to who asks for that transfer.
    """
    from importlib.metadata import PackageNotFoundError, version  # not for the command line, which answers at once

    try:
        installed = version("verl")
    except PackageNotFoundError:  # a source tree on the path
        return
    if installed.startswith("0.9."):
        sys.modules.setdefault("verl.checkpoint_engine.hccl_checkpoint_engine", None)  # type: ignore[arg-type]


def look_through_all_objects_less_often() -> None:
    """Python looks through everything that is imported, again and again, while more is imported.

    Once all is imported it does so seldom by itself, as it waits for a quarter more objects.
    """
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, 1000)


def prepare() -> None:
    """All of the above; a second call changes nothing."""
    leave_out_scipy()
    leave_out_ascend_transfer()
    look_through_all_objects_less_often()
