"""Weight updates of a vLLM CPU worker, from the trainer through shared memory.

verl injects a class of remote methods into every vLLM worker, and the configuration can name
another one (`rollout.engine_kwargs.vllm.worker_extension_cls`). Only rollouts get weight updates, so only
they use this class; plain evaluation keeps vLLM's packed CPU kernels.
"""

import traceback
from typing import Any

import torch
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

NamedWeights = list[tuple[str, torch.Tensor]]


def keep_weights_unpacked() -> None:
    """Let vLLM's CPU layers multiply with their parameter instead of a packed copy (vLLM 0.28).

    vLLM packs each weight after loading. Linear layers then drop the parameter, so an update has
    nothing to load into; an output head tied to the embedding silently keeps the packed *old* weight, even
    after vLLM's layer-wise reload, which visits tied parameters once. `F.linear` is vLLM's own
    fallback. In float32 on one thread it took between half and 1.5 times as long per layer, by shape and batch.
    """
    from vllm.model_executor.layers import utils

    utils.dispatch_cpu_unquantized_gemm = _use_plain_linear


def _use_plain_linear(layer: Any, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear


class CpuWorkerExtension(vLLMColocateWorkerExtension):
    """verl's worker extension for vLLM's CPU worker, whose failed updates end the run.

    In stock verl an exception while loading leaves the sender waiting for its acknowledgement for
    ever. Here the remaining buckets are received and dropped, and the error is raised after.
    """

    _update_failure: str | None = None

    def __new__(cls, **kwargs: Any):
        keep_weights_unpacked()  # vLLM creates the worker before it loads the model
        return super().__new__(cls, **kwargs)

    def update_weights_from_ipc(self, *args: Any, **kwargs: Any) -> None:
        """Receive the policy's weights and load them.

        Raises:
            RuntimeError: loading failed; the message carries the original traceback.
        """
        self._update_failure = None
        super().update_weights_from_ipc(*args, **kwargs)
        if self._update_failure is not None:
            raise RuntimeError(f"vLLM could not load the trainer's weights:\n{self._update_failure}")

    def _update_weights(self, weights: NamedWeights, *args: Any, **kwargs: Any) -> None:
        if self._update_failure is not None:
            return
        try:
            super()._update_weights(weights, *args, **kwargs)
        except Exception:
            # Of whatever kind: one that got out here would leave the sender waiting for ever. It is raised above once
            # the sender is done; as text, for the exception's frames would keep views of the shared memory segment
            # alive, which then cannot be closed.
            self._update_failure = traceback.format_exc()
