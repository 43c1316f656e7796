"""What continued pre-training reads, and that verl trains on exactly that, on any number of ranks."""

import copy
import json
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from process_ranks import run_ranks
from sft_runs import LONGER, PROBLEM, batch_of, engine_of, loss_of_step, sft_config

from ptl_rl.attention import FLASH
from ptl_rl.config import ConfigError, CptConfig
from ptl_rl.data.corpora import Record
from ptl_rl.recovery.cpt import batch_sequences
from ptl_rl.recovery.sequences import Counts, SequenceFile, document_ids, write_sequences

TEXT = Record("", "The train leaves at noon. " * 8, "", "s", "3")


def write(records, tokenizer, folder: Path, max_tokens=512, response_only=False) -> tuple[SequenceFile, Counts]:
    path = folder / "s.arrow"
    counts = write_sequences(
        records, tokenizer, path, suffix=" Box it.", max_tokens=max_tokens, response_only=response_only
    )
    return SequenceFile(str(path)), counts


def test_all_tokens_or_the_solutions_count(tokenizer, tmp_path):
    everything, counts = write([PROBLEM, TEXT], tokenizer, tmp_path)
    ids, prompt = document_ids(tokenizer, PROBLEM, " Box it.")
    assert everything[0]["input_ids"].tolist() == ids
    assert "Box it." in tokenizer.decode(ids[:prompt]) and "\\boxed{7}" in tokenizer.decode(ids[prompt:])
    assert ids[-1] == tokenizer.eos_token_id
    # Nothing predicts a document's first token; verl would take the document before it for its context.
    assert everything[0]["loss_mask"].tolist() == [0] + [1] * (len(ids) - 1)
    assert counts == Counts(2, 2, sum(len(everything[i]["input_ids"]) for i in range(2)), 0)
    solutions, _ = write([PROBLEM, TEXT], tokenizer, tmp_path, response_only=True)
    assert solutions[0]["loss_mask"].tolist() == [0] * prompt + [1] * (len(ids) - prompt)
    assert solutions[1]["loss_mask"].tolist() == [0] + [1] * (len(solutions[1]["input_ids"]) - 1)


def test_every_document_ends_once(tokenizer):
    """So that the model learns where to stop; a tokenizer may have no token for it."""
    end = tokenizer.eos_token_id
    text, _ = document_ids(tokenizer, TEXT, "")
    problem, prompt = document_ids(tokenizer, PROBLEM, "")
    for ids in (text, problem[prompt:]):
        assert ids[-1] == end and ids.count(end) == 1
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    assert document_ids(endless, TEXT, "")[0] == text[:-1]


def test_long_solutions_are_cut_and_long_texts_divided(tokenizer, tmp_path):
    ids, _ = document_ids(tokenizer, TEXT, "")
    found, counts = write([TEXT, PROBLEM], tokenizer, tmp_path, max_tokens=21)
    assert counts.cut == 1 and counts.sequences == len(found) == -(-len(ids) // 21) + 1
    pieces = [token for i in range(len(found) - 1) for token in found[i]["input_ids"].tolist()]
    assert pieces == ids
    assert len(found[len(found) - 1]["input_ids"]) == 21


def test_sequences_without_a_token_that_counts_are_left_out(tokenizer, tmp_path):
    _, prompt = document_ids(tokenizer, PROBLEM, " Box it.")
    found, counts = write([PROBLEM], tokenizer, tmp_path, max_tokens=prompt, response_only=True)
    assert len(found) == counts.sequences == 0 and counts.documents == 1


def test_the_batch_in_tokens_becomes_sequences():
    counts = Counts(documents=100, sequences=100, tokens=5000, cut=0)
    assert batch_sequences(CptConfig(tokens_per_step=1010), counts, workers=4) == 20  # of 50 tokens on average
    assert batch_sequences(CptConfig(sequences_per_step=32), counts, workers=4) == 32
    prime = CptConfig(tokens_per_step=6200)  # 31 sequences on each of four workers, of which a micro-batch has one
    assert batch_sequences(prime, replace(counts, sequences=200, tokens=10_000), workers=4) == 124
    assert batch_sequences(prime, replace(counts, sequences=200, tokens=10_000), workers=4, rows=8) == 128
    assert batch_sequences(CptConfig(tokens_per_step=1010), counts, workers=4, rows=8) == 20  # fewer than the rows
    with pytest.raises(ConfigError, match="a step reads 128 sequences, but this cycle's subset has 100"):
        batch_sequences(CptConfig(sequences_per_step=128), counts, workers=4)


def test_what_is_asked_for_reaches_verl(tmp_path, make_checkpoint):
    verl = sft_config(
        tmp_path, make_checkpoint("llama"), tmp_path / "s.arrow", 2, reshard_after_forward=False, save_every_steps=2,
        verl={"optim.betas": [0.9, 0.95]},
    )  # fmt: skip
    assert verl.engine.reshard_after_forward is False and verl.engine.strategy == "fsdp2"
    assert (verl.optim.lr_scheduler_type, verl.optim.lr_warmup_steps_ratio) == ("cosine", 0.05)
    assert verl.optim.betas == [0.9, 0.95]
    assert verl.data.train_batch_size == 8 and verl.trainer.total_training_steps == 3
    assert verl.trainer.n_gpus_per_node == 2 and verl.trainer.resume_mode == "auto"
    assert list(verl.checkpoint.save_contents) == ["hf_model", "model", "optimizer", "extra"]
    assert verl.engine.mixed_precision.param_dtype == "fp32" and verl.model.use_remove_padding is False


def test_a_head_node_without_gpus_counts_tokens_on_its_cpu(tmp_path, make_checkpoint, tokenizer, monkeypatch):
    """The stage's own process may see no GPU; verl would make a tensor on one at every step."""
    from torch import tensor
    from verl.trainer import sft_trainer_ray
    from verl.utils import tensordict_utils as tu

    from ptl_rl.recovery.trainer import SequenceTrainer

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    write([PROBLEM, LONGER] * 4, tokenizer, tmp_path)
    verl = sft_config(tmp_path, make_checkpoint("llama"), tmp_path / "s.arrow", 1, steps=1)
    verl.trainer.device, verl.trainer.total_training_steps = "cuda", 1
    verl.trainer.logger = []
    logged = []

    class Client:
        def train_batch(self, data):
            metrics = {name: tensor(0.0) for name in ("loss", "grad_norm", "lr", "mfu")}
            return types.SimpleNamespace(get=lambda: tu.get_tensordict({}, {"metrics": metrics}))

        def _query_dispatch_info(self, name):
            return [0]

    class Checkpoints:
        load_checkpoint = staticmethod(lambda: 0)
        save_checkpoint = staticmethod(lambda step: None)

    monkeypatch.setattr(SequenceTrainer, "_build_engine", lambda self: setattr(self, "training_client", Client()))
    monkeypatch.setattr(SequenceTrainer, "_build_ckpt_handler", lambda self: setattr(self, "ckpt_handler", Checkpoints))
    monkeypatch.setattr(
        sft_trainer_ray.Tracking, "log", lambda self, data, step: logged.append(data["train/global_tokens"])
    )
    SequenceTrainer(verl).fit()
    assert logged == [sum(len(document_ids(tokenizer, p, " Box it.")[0]) for p in [PROBLEM, LONGER]) * 4]


def _train(rank: int, ranks: int, folder: str, model: str, sequences: str) -> None:
    verl = sft_config(Path(folder), Path(model), Path(sequences), ranks, save_every_steps=2)
    file = SequenceFile(sequences)

    def loss_of(engine, step: int) -> float:
        return loss_of_step(engine, file, verl, step, rank, ranks)

    def parameters_of(engine) -> dict[str, torch.Tensor]:
        return {name: p.full_tensor().detach() for name, p in engine.module.named_parameters()}

    engine = engine_of(verl)
    losses = [loss_of(engine, 0), loss_of(engine, 1)]
    engine.save_checkpoint(f"{folder}/middle-{ranks}", global_step=2)
    losses.append(loss_of(engine, 2))
    engine.save_checkpoint(f"{folder}/saved-{ranks}", global_step=3)
    parameters = parameters_of(engine)
    resumed = engine_of(verl)
    resumed.load_checkpoint(f"{folder}/middle-{ranks}")
    assert loss_of(resumed, 2) == losses[2]
    again = parameters_of(resumed)
    assert all(torch.equal(again[name], value) for name, value in parameters.items())
    if rank == 0:
        torch.save(parameters, Path(folder) / f"{ranks}.pt")
        (Path(folder) / f"{ranks}.json").write_text(json.dumps(losses))


def test_two_ranks_train_and_resume_as_one_does(tokenizer, make_checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM

    records = [PROBLEM, LONGER, TEXT] * 4
    write(records, tokenizer, tmp_path, max_tokens=64)
    arguments = (str(tmp_path), str(make_checkpoint("llama")), str(tmp_path / "s.arrow"))
    for ranks in (1, 2):
        run_ranks(_train, ranks, *arguments)
    one, two = (json.loads((tmp_path / f"{ranks}.json").read_text()) for ranks in (1, 2))
    assert one == pytest.approx(two, rel=1e-4)
    assert one[2] < one[0] - 0.01  # it learns
    first, second = (torch.load(tmp_path / f"{ranks}.pt", weights_only=True) for ranks in (1, 2))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: name + text)
    for ranks, trained in ((1, first), (2, second)):  # each rank writes its share
        folder = tmp_path / f"saved-{ranks}/huggingface"
        assert len(list(folder.glob("*.safetensors"))) == ranks and (folder / "tokenizer.json").exists()
        assert "attn_implementation" not in json.loads((folder / "config.json").read_text())  # the training's own
        saved = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())  # in the type it was saved in
        assert saved.keys() == trained.keys()
        assert all(torch.equal(saved[name], value) for name, value in trained.items())


def _with_parent(_rank: int, _ranks: int, folder: str, model: str, parent: str, sequences: str) -> None:
    """The loss and its gradient, by verl's engine and by the definition."""
    from transformers import AutoModelForCausalLM

    from ptl_rl.recovery.parent import ParentLoss, ask_for_logits

    verl = sft_config(Path(folder), Path(model), Path(sequences), 1, micro_batch_tokens=4096)
    engine, file = engine_of(verl), SequenceFile(sequences)
    loss_function = ParentLoss(Path(parent), 0.7, 0.4, "sdpa", "float32")
    batch = batch_of(file, range(3), verl)
    ask_for_logits(batch)
    with engine.train_mode():
        engine.optimizer_zero_grad()
        found = engine.forward_backward_batch(batch, loss_function, forward_only=False)
        gradients = {name: p.grad.full_tensor() for name, p in engine.module.named_parameters()}
    on_device = batch.to("cpu")
    padded_NV = loss_function.parent_logits(on_device)
    loss_function.attention = FLASH  # of the way it reads; sdpa, too, takes documents apart by their positions
    torch.testing.assert_close(loss_function.parent_logits(on_device), padded_NV, rtol=1e-4, atol=1e-5)
    policy, teacher = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (model, parent))
    total, tokens = torch.zeros(()), 0
    for i in range(3):
        ids_T, mask_T = file[i]["input_ids"], file[i]["loss_mask"][1:]
        log_q_TV = policy(input_ids=ids_T[None]).logits[0, :-1].log_softmax(-1)
        with torch.no_grad():
            log_p_TV = teacher(input_ids=ids_T[None]).logits[0, :-1].log_softmax(-1)
        own_T = -log_q_TV.gather(1, ids_T[1:, None])[:, 0]
        apart_T = (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1)
        total = total + ((0.4 * own_T + 0.7 * apart_T) * mask_T).sum()
        tokens += int(mask_T.sum())
    (total / tokens).backward()
    expected = {name: p.grad for name, p in policy.named_parameters()}
    assert sum(found["loss"]) == pytest.approx(float(total / tokens), rel=1e-4)
    for name, value in expected.items():
        torch.testing.assert_close(
            gradients[name], value, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: name + text
        )


def test_the_parents_divergence_joins_the_loss(tokenizer, make_checkpoint, tmp_path):
    write([PROBLEM, LONGER, TEXT], tokenizer, tmp_path, response_only=True)
    model, parent = make_checkpoint("qwen2"), make_checkpoint("qwen2", seed=1, intermediate_size=64)
    run_ranks(_with_parent, 1, str(tmp_path), str(model), str(parent), str(tmp_path / "s.arrow"))


def _log_probs(_rank: int, _ranks: int, folder: str, model: str, sequences: str) -> None:
    from verl.utils import tensordict_utils as tu

    verl = sft_config(Path(folder), Path(model), Path(sequences), 1, micro_batch_tokens=4096)
    engine, file = engine_of(verl), SequenceFile(sequences)

    def read(indices) -> list[torch.Tensor]:
        seen = []

        def keep(model_output, data, dp_group=None):
            lengths = data["input_ids"].offsets().diff().tolist()
            seen.extend(model_output["log_probs"].values().split(lengths))
            return torch.zeros((), requires_grad=True), {}

        with engine.eval_mode():
            batch = batch_of(file, indices, verl)
            tu.assign_non_tensor(batch, compute_loss=True)
            engine.infer_batch(batch, keep)
        return [log_p_T.detach()[:-1] for log_p_T in seen]  # the last one's label is the next document's

    together = sorted(read([0, 1, 2]), key=len)
    alone = sorted((read([i])[0] for i in range(3)), key=len)
    torch.save({"together": together, "alone": alone}, Path(folder) / "log_probs.pt")


def test_no_document_sees_another_of_its_micro_batch(tokenizer, make_checkpoint, tmp_path):
    write([PROBLEM, LONGER, TEXT], tokenizer, tmp_path)
    run_ranks(_log_probs, 1, str(tmp_path), str(make_checkpoint("qwen2")), str(tmp_path / "s.arrow"))
    found = torch.load(tmp_path / "log_probs.pt", weights_only=True)
    assert len(found["together"]) == len(found["alone"]) == 3
    for together_T, alone_T in zip(found["together"], found["alone"], strict=True):
        torch.testing.assert_close(together_T, alone_T, rtol=1e-4, atol=1e-5)


def test_the_parent_reads_rows_of_the_longest_document_not_of_all_tokens():
    from types import SimpleNamespace

    from ptl_rl.recovery.parent import ParentLoss

    read = []

    def parent(input_ids, **_):
        read.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=torch.nn.functional.one_hot(input_ids, 16).float())

    loss_function = ParentLoss(Path("parent"), 1.0, 1.0, "sdpa", "float32")
    loss_function._parent = parent
    ids = torch.nested.nested_tensor_from_jagged(torch.arange(12), torch.tensor([0, 3, 5, 12]))
    assert loss_function.parent_logits({"input_ids": ids}).argmax(-1).tolist() == list(range(12))
    assert read == [(3, 7)]
