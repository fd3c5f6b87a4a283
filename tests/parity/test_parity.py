"""Our softmax model, optimizers and schedules against numbers that nanochat's own code gave (make.py)."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from gkachat.config import Config, GPTConfig, OptimConfig, TrainConfig
from gkachat.data.loader import gather_rows
from gkachat.data.packing import crop_documents
from gkachat.data.shards import Documents
from gkachat.eval.bundle import Task
from gkachat.eval.core import _evaluate_task
from gkachat.model.gpt import GPT
from gkachat.train.distributed import World
from gkachat.train.optim import make_optimizers
from gkachat.train.schedule import lr_multiplier, muon_momentum, resolve, set_hyperparameters
from tests.parity.make import SCHEDULE, SCHEDULE_LENGTHS, STEPS, TOTAL_BATCH, WEIGHT_DECAY

FILE = Path(__file__).with_name("nanochat.safetensors")


@pytest.fixture(scope="module")
def nanochat():
    with safe_open(FILE, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["shape"])  # noqa: SIM118


def our_name(name):
    """The name in our model of a parameter of nanochat's."""
    table = {
        "transformer.wte.weight": "wte.weight", "resid_lambdas": "residual_scale", "x0_lambdas": "x0_mix",
        "smear_gate.weight": "smear.gate.weight", "smear_lambda": "smear.share", "backout_lambda": "backout",
    }  # fmt: skip
    if name.startswith("value_embeds."):
        return f"blocks.{name.split('.')[1]}.attn.value_embedding.table.weight"
    name = name.replace("transformer.h.", "blocks.").replace("attn.ve_gate", "attn.value_embedding.gate")
    return table.get(name, name)


def ours(tensors, prefix):
    return {our_name(name.removeprefix(prefix)): t for name, t in tensors.items() if name.startswith(prefix)}


@pytest.fixture
def model(nanochat):
    tensors, shape = nanochat
    model = GPT(
        GPTConfig(
            depth=shape["n_layer"],
            n_embd=shape["n_embd"],
            head_dim=shape["n_embd"] // shape["n_head"],
            vocab_size=shape["vocab_size"],
            sequence_len=shape["sequence_len"],
        )
    )
    model.load_state_dict(ours(tensors, "weights/"))
    return model


def test_logits_loss_and_gradients(nanochat, model):
    tensors, _ = nanochat
    inputs, targets = tensors["batch/inputs"], tensors["batch/targets"]
    torch.testing.assert_close(model(inputs), tensors["logits"], rtol=1e-5, atol=1e-5)
    loss = model(inputs, targets)
    torch.testing.assert_close(loss, tensors["loss"], rtol=1e-5, atol=0)
    loss.backward()
    expected = ours(tensors, "gradients/")
    assert expected.keys() == {name for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5 * expected[name].abs().max().item())


class Bytes:
    """A tokenizer of bytes, with 127 as BOS."""

    bos = 127

    def encode(self, text):
        return [*text.encode()]


@pytest.mark.parametrize("kind", ["multiple_choice", "schema", "language_modeling"])
@torch.inference_mode()
def test_decisions_of_core(model, kind):
    with safe_open(FILE, "pt") as file:
        expected = json.loads(file.metadata()["core"])[kind]
    meta, rows = expected["meta"], expected["rows"]
    task = Task(kind, kind, meta["num_fewshot"], meta["continuation_delimiter"], 0.0, rows, len(rows), "")
    assert any(expected["correct"]) and not all(expected["correct"])
    assert _evaluate_task(model, Bytes(), task, World(), None, lambda n: None)["correct"] == expected["correct"]


def test_rows_of_the_crop_loader(nanochat):
    tensors, _ = nanochat
    lengths = tensors["loader/lengths"].long().numpy()
    documents = Documents(np.concatenate(([0], lengths.cumsum())), lambda: tensors["loader/tokens"].numpy())
    plan = crop_documents(lengths, sequence_len=32)
    rows = tensors["loader/rows"]
    inputs, targets = gather_rows([(documents, plan, row) for row in range(len(rows))], 32, bos=0)
    assert torch.equal(torch.cat((inputs, targets[:, -1:]), dim=1), rows.long())
    assert (inputs[:, 1:] == targets[:, :-1]).all()


def config(steps, model=None):
    """The config of a run of so many steps with nanochat's options of make.py."""
    train = TrainConfig(
        total_tokens=steps * TOTAL_BATCH, total_batch_size=TOTAL_BATCH, warmup_steps=SCHEDULE["warmup_steps"],
        warmdown_fraction=SCHEDULE["warmdown_ratio"], final_lr_fraction=SCHEDULE["final_lr_frac"],
    )  # fmt: skip
    model = model or GPTConfig(depth=1, sequence_len=128)
    return Config(model=model, train=train, optim=OptimConfig(weight_decay=WEIGHT_DECAY))


@pytest.mark.parametrize("length", SCHEDULE_LENGTHS)
def test_schedules(nanochat, length):
    tensors, _ = nanochat
    run = resolve(config(length))
    [group] = (optimizer := torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], momentum=0.5)).param_groups
    group["initial_lr"] = 1.0
    for step in range(length):
        set_hyperparameters([optimizer], step, run)
        found = group["lr"], group["momentum"], group["weight_decay"]
        expected = [tensors[f"schedule/{length}/{name}"][step].item() for name in ("lr", "momentum", "decay")]
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12), step
    assert (lr_multiplier(0, run), muon_momentum(0, run)) == pytest.approx((1 / 3, 0.85))


def test_training(nanochat, model):
    tensors, _ = nanochat
    run = resolve(config(STEPS, model.config))
    # Our batch is whole rows of 144 tokens. nanochat's rates follow from the number of tokens that was given.
    optimizers = make_optimizers(model, replace(run.optim, lr_scale=(TOTAL_BATCH / 2**19) ** 0.5))
    losses = []
    for step in range(STEPS):
        loss = model(tensors["batch/inputs"], tensors["batch/targets"])
        loss.backward()
        losses.append(loss.detach())
        set_hyperparameters(optimizers, step, run)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    torch.testing.assert_close(torch.stack(losses), tensors["training/losses"], rtol=1e-4, atol=1e-5)
    expected = ours(tensors, "training/weights/")
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=0, atol=1e-3 * expected[name].abs().max().item())
