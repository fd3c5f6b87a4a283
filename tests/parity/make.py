"""Write nanochat.safetensors: numbers that nanochat's own code computes, which test_parity.py holds ours against.

git clone https://github.com/karpathy/nanochat && git -C nanochat checkout 92d63d4
python tests/parity/make.py nanochat

Runs nanochat on a CPU in float32, on a model with random weights in every parameter. Nothing of nanochat is copied:
the file holds inputs and results.
"""

import argparse
import ast
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

OUT = Path(__file__).with_name("nanochat.safetensors")
SHAPE = {"sequence_len": 144, "vocab_size": 128, "n_layer": 4, "n_head": 2, "n_kv_head": 2, "n_embd": 32}
ROWS, STEPS, TOTAL_BATCH, WEIGHT_DECAY = 2, 12, 2**17, 0.1
SCHEDULE = {"warmup_steps": 3, "warmdown_ratio": 0.65, "final_lr_frac": 0.05}
SCHEDULE_LENGTHS = (12, 1000)
DOC_LENGTHS, BUFFER, LOADER_ROWS, LOADER_T = (1, 60), 1000, 40, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nanochat", type=Path, help="a checkout of nanochat")
    checkout = parser.parse_args().nanochat.resolve()
    sys.path.insert(0, str(checkout))
    found = model_numbers() | schedule_numbers(checkout / "scripts" / "base_train.py") | loader_numbers()
    metadata = {"shape": json.dumps(SHAPE), "core": json.dumps(core_numbers())}
    save_file(found, OUT, metadata=metadata)
    print(f"{OUT}: {OUT.stat().st_size:,} bytes")


def random_model():
    """Return nanochat's model with noise added to every parameter, since many start at zero."""
    from nanochat.gpt import GPT, GPTConfig

    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE))
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def model_numbers() -> dict[str, torch.Tensor]:
    """Return weights, a batch, logits, loss, gradients, and losses and weights of a short training."""
    model = random_model()
    idx = torch.randint(SHAPE["vocab_size"], (ROWS, SHAPE["sequence_len"] + 1))
    inputs, targets = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
    targets[0, :5] = -1
    found = {"batch/inputs": inputs, "batch/targets": targets}
    found |= {f"weights/{name}": p.detach().clone() for name, p in model.named_parameters()}
    found["logits"] = model(inputs).detach()
    loss = model(inputs, targets)
    loss.backward()
    found["loss"] = loss.detach()
    found |= {f"gradients/{name}": p.grad.clone() for name, p in model.named_parameters()}

    multipliers = schedules(Path(sys.path[0]) / "scripts" / "base_train.py", STEPS)
    scale = (TOTAL_BATCH / 2**19) ** 0.5
    optimizer = model.setup_optimizer(
        unembedding_lr=0.008 * scale, embedding_lr=0.3 * scale, scalar_lr=0.5 * scale, matrix_lr=0.02 * scale,
        weight_decay=WEIGHT_DECAY,
    )  # fmt: skip
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multipliers["lr"](step)
            if group["kind"] == "muon":
                group["momentum"], group["weight_decay"] = multipliers["momentum"](step), multipliers["decay"](step)
        model.zero_grad()
        loss = model(inputs, targets)
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
    found["training/losses"] = torch.stack(losses)
    return found | {f"training/weights/{name}": p.detach().clone() for name, p in model.named_parameters()}


def schedules(script: Path, num_iterations: int) -> dict:
    """Return the schedule functions, which the training script defines among its statements."""
    names = {"get_lr_multiplier": "lr", "get_muon_momentum": "momentum", "get_weight_decay": "decay"}
    tree = ast.parse(script.read_text())
    body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    args = SimpleNamespace(**SCHEDULE)
    space = {"math": __import__("math"), "args": args, "num_iterations": num_iterations}
    space["weight_decay_scaled"] = WEIGHT_DECAY
    exec(compile(ast.Module(body, []), str(script), "exec"), space)
    return {short: space[name] for name, short in names.items()}


def schedule_numbers(script: Path) -> dict[str, torch.Tensor]:
    """Return learning-rate multipliers, momenta and weight decays of every step, for each length of training."""
    found = {}
    for length in SCHEDULE_LENGTHS:
        for name, function in schedules(script, length).items():
            values = [function(step) for step in range(length)]
            found[f"schedule/{length}/{name}"] = torch.tensor(values, dtype=torch.float64)
    return found


def loader_numbers() -> dict[str, torch.Tensor]:
    """Return documents, as token ids, and the rows that the best-fit loader makes of them."""
    from nanochat import dataloader

    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(*DOC_LENGTHS, (3000,), generator=generator)
    tokens = torch.randint(1, 100, (int(lengths.sum()),), generator=generator)
    documents = [t.tolist() for t in tokens.split(lengths.tolist())]

    class Ids:
        """A tokenizer whose texts are token ids already."""

        def get_bos_token_id(self):
            return 0

        def encode(self, texts, prepend, num_threads):
            return [[prepend, *text] for text in texts]

    def batches(split, state, size):
        for start in range(0, len(documents), size):
            yield documents[start : start + size], (0, 0, 1)

    dataloader._document_batches = batches
    loader = dataloader.tokenizing_distributed_data_loader_bos_bestfit(
        Ids(), LOADER_ROWS, LOADER_T, "train", device="cpu"
    )
    inputs, targets = next(iter(loader))
    rows = torch.cat((inputs, targets[:, -1:]), dim=1)
    return {
        name: t.to(torch.uint8)
        for name, t in {"loader/lengths": lengths, "loader/tokens": tokens, "loader/rows": rows}.items()
    }


def core_numbers() -> dict:
    """Return examples of each kind of CORE task and whether nanochat's scoring calls the model right on them."""
    from nanochat.core_eval import evaluate_example

    class Bytes:
        """A tokenizer of bytes below 127, with 127 as BOS."""

        def get_bos_token_id(self):
            return 127

        def __call__(self, texts, prepend):
            return [[prepend, *text.encode()] for text in texts]

    model, device = random_model().eval(), torch.device("cpu")
    words = ["red", "blue", "green", "tall", "small", "quick", "round", "cold"]
    kinds = {
        "multiple_choice": [
            {"query": f"Q: {w} or {v}?", "choices": [w, v, w + v], "gold": i % 3}
            for i, (w, v) in enumerate(zip(words, words[3:] + words[:3], strict=True))
        ],
        "schema": [
            {"context_options": [f"The {w} one", f"A {v} thing"], "continuation": f"is {v}.", "gold": i % 2}
            for i, (w, v) in enumerate(zip(words, words[3:] + words[:3], strict=True))
        ],
        "language_modeling": [{"context": f"Say {w}:", "continuation": w[0]} for w in words[:4]],
    }
    for number in range(1000):  # four contexts that the model continues with what is a character
        context = f"{number} is {number % 7 * number}" + chr(33 + number % 94)
        with torch.no_grad():
            said = chr(model(torch.tensor(Bytes()([context], 127)))[0, -1].argmax())
        if " " < said < "\x7f" and len(kinds["language_modeling"]) < 8:
            kinds["language_modeling"].append({"context": context, "continuation": said})
    decisions = {}
    for kind, rows in kinds.items():
        meta = {"task_type": kind, "num_fewshot": 1, "continuation_delimiter": " "}
        if kind == "language_modeling":
            meta |= {"num_fewshot": 0, "continuation_delimiter": ""}
        correct = [evaluate_example(i, model, Bytes(), rows, device, meta) for i in range(len(rows))]
        decisions[kind] = {"meta": meta, "rows": rows, "correct": [bool(c) for c in correct]}
    return decisions


if __name__ == "__main__":
    main()
