"""The parent's divergence gets the right gradient beside flash-attn's cross entropy, which overwrites the logits."""

import types
from pathlib import Path

import pytest
import torch
from verl.utils import tensordict_utils as tu
from verl.utils import torch_functional
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

import ptl_rl.verl_patches.engine  # noqa: F401  (as a worker has it)
from ptl_rl.recovery.parent import ParentLoss, ask_for_logits

LENGTHS, VOCABULARY = [5, 9], 40


class InPlace(torch.autograd.Function):
    """As flash-attn's kernel: the gradient is written where the logits are, and autograd does not see it."""

    @staticmethod
    def forward(ctx, logits_NV, labels_N):
        total_N = logits_NV.logsumexp(-1)
        ctx.save_for_backward(logits_NV, total_N, labels_N)
        return total_N - logits_NV.gather(-1, labels_N[:, None]).squeeze(-1)

    @staticmethod
    def backward(ctx, gradient_N):
        logits_NV, total_N, labels_N = ctx.saved_tensors
        gradient_NV = (logits_NV - total_N[:, None]).exp()
        gradient_NV[torch.arange(len(labels_N)), labels_N] -= 1
        logits_NV.data.copy_(gradient_NV * gradient_N[:, None])
        return logits_NV, None


def gradient(padded: bool) -> tuple[float, torch.Tensor]:
    """Loss and gradient by verl's own way from logits to the loss."""
    generator, tokens = torch.Generator().manual_seed(0), sum(LENGTHS)
    weight_HV = torch.randn(8, VOCABULARY, generator=generator, requires_grad=True)
    logits_NV = torch.randn(tokens, 8, generator=generator) @ weight_HV
    parent_NV = torch.randn(tokens, VOCABULARY, generator=generator)
    ids_N = torch.randint(VOCABULARY, (tokens,), generator=generator)
    offsets = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)])
    counts_N = torch.ones(tokens, dtype=torch.long)
    counts_N[offsets[:-1]] = 0
    columns = {"input_ids": ids_N, "loss_mask": counts_N}
    data = tu.get_tensordict(
        {name: torch.nested.nested_tensor_from_jagged(values, offsets) for name, values in columns.items()},
        {"use_remove_padding": not padded, "pad_mode": "no_padding", "dp_size": 1}
        | {"temperature": 1.0, "batch_num_tokens": int(counts_N.sum())},
    )
    ask_for_logits(data)
    loss_function = ParentLoss(Path("x"), 1.0, 1.0, "flash_attention_2", "float32")
    loss_function.parent_logits = lambda _: parent_NV
    labels = {"input_ids_rmpad_rolled": torch.roll(ids_N, -1), "temperature_is_one": True}
    if padded:
        rows = logits_NV.split(LENGTHS)
        logits = torch.stack([torch.nn.functional.pad(row, (0, 0, 0, max(LENGTHS) - len(row))) for row in rows])
        labels["temperature"] = torch.ones(len(LENGTHS))
    else:
        logits = logits_NV[None]
        labels |= {"temperature_rmpad": torch.ones(tokens), "pad_size": 0}
    engine = types.SimpleNamespace(
        engine_config=types.SimpleNamespace(entropy_checkpointing=False),
        _gather_and_unpad_packed=lambda values, pad_size: values,
    )
    output = FSDPEngineWithLMHead.prepare_model_outputs(
        engine, types.SimpleNamespace(logits=logits), labels, data, loss_function
    )
    loss, _ = loss_function(model_output=output, data=data)
    loss.backward()
    return loss.item(), weight_HV.grad


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
def test_the_gradient_is_right_where_flash_attn_overwrites_the_logits(padded, monkeypatch):
    monkeypatch.setenv("VERL_DISABLE_FLASH_ATTN_CE", "0")  # put back after the test
    monkeypatch.setattr(torch_functional, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", False)
    expected_loss, expected_HV = gradient(padded)
    monkeypatch.setenv("VERL_DISABLE_FLASH_ATTN_CE", "0")
    monkeypatch.setattr(torch_functional, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", True)
    kernel = lambda logits_NV, labels_N, inplace_backward: (InPlace.apply(logits_NV, labels_N), None)  # noqa: E731
    monkeypatch.setattr(torch_functional, "cross_entropy_loss", kernel, raising=False)
    loss, found_HV = gradient(padded)
    assert loss == pytest.approx(expected_loss)
    torch.testing.assert_close(found_HV, expected_HV)
