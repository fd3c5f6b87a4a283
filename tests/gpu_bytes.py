"""Count the bytes that compiled training moves on a GPU, from Inductor's own kernels. It needs CUDA, or a null GPU.

    python tests/gpu_bytes.py head --plain      head and loss in plain PyTorch; without --plain: the Triton form
    python tests/gpu_bytes.py gka_conv          four blocks of d20's width, without the head; also softmax

The method: every kernel reads each tensor that it takes once and writes each result once. Slices count as slices, and
a tensor that one kernel reads twice counts once, as if a cache held it. The same rule counts inside our operators.
The batch is 32 rows of 2,048 tokens with 1,280 channels and a vocabulary of 32,768, in bfloat16.
"""

import argparse
import json
from collections import Counter, defaultdict
from math import prod

import torch
from torch import Tensor
from torch._inductor import config, ir, scheduler
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V as inductor
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from gkachat.attention import features, features_triton
from gkachat.attention.kernels import sdpa
from gkachat.config import GPTConfig
from gkachat.model import loss, loss_triton
from gkachat.model.gpt import GPT

B, T, C, V = 32, 2048, 1280, 32_768


def bytes_of(node) -> int:
    """Return the bytes of a tensor of Inductor's."""
    return prod(int(s) for s in node.get_size()) * node.get_dtype().itemsize


def gigabytes(n: int) -> float:
    return round(n / 1e9, 2)


def fused_bytes(node) -> int:
    """Return what a generated kernel reads and writes. What only the kernel itself uses is never written."""
    inside = set(node.get_nodes())
    total = 0
    for dependencies in (node.read_writes.reads, node.read_writes.writes):
        sizes = defaultdict(int)
        for dependency in dependencies:
            sizes[dependency.name] += dependency.numbytes_hint()
        for name, size in sizes.items():
            buffer = node.scheduler.name_to_buf.get(name)
            if buffer is not None and not {user.node for user in buffer.users} - inside:
                continue
            tensor = inductor.graph.name_to_buffer.get(name) or inductor.graph.graph_inputs.get(name)
            total += min(size, bytes_of(tensor)) if isinstance(tensor, ir.Buffer | ir.TensorBox) else size
    return total


def watch() -> list[Counter]:
    """Make Inductor append, for each graph that it compiles, the bytes of its kernels by kind."""
    graphs, codegen = [], GraphLowering.codegen

    def counted(graph):
        out, found = codegen(graph), Counter()
        for node in graph.scheduler.nodes:
            if isinstance(node, scheduler.ExternKernelSchedulerNode):
                if isinstance(node.node, ir.MultiOutput):
                    found["operators' results"] += bytes_of(node.node)
                    continue
                operator = str(getattr(node.node, "op_overload", None) or node.node.python_kernel_name)
                tensors = [t for t in node.node.inputs if not isinstance(t, list | tuple)]
                own = "gkachat" in operator
                result = 0 if isinstance(node.node.layout, ir.MultiOutputLayout) else bytes_of(node.node)
                found[operator if own else "library"] += 0 if own else sum(map(bytes_of, tensors)) + result
                found[f"{operator} kernels" if own else "library kernels"] += 1
            elif not isinstance(node, scheduler.NopKernelSchedulerNode):
                found["generated"] += fused_bytes(node)
                found["generated kernels"] += 1
        graphs.append(found)
        return out

    GraphLowering.codegen = counted
    return graphs


class Inside(TorchDispatchMode):
    """Counts what an operator of ours does: torch's operations and our kernels, on tensors without data."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # What only allocates or makes a view moves nothing. An `out` is written, and read too where it is added to.
        if not func.is_view and "empty" not in str(func) and "detach" not in str(func):
            into = (kwargs or {}).get("out")
            tensors = [*args, *(out if isinstance(out, tuple) else [out])] if into is None else [*args, into]
            size = sum(t.numel() * t.itemsize for t in tensors if isinstance(t, Tensor))
            self.bytes["products" if "mm" in str(func) else "others"] += size
        return out

    def launch(self, written_in_place: int):
        """Return a stand-in for a Triton kernel; the tensor at this index is read and written."""

        class Kernel:
            def __getitem__(_, grid):
                def run(*args, **options):
                    for index, t in enumerate(args):
                        if isinstance(t, Tensor):
                            self.bytes["kernels"] += t.numel() * t.itemsize * (2 if index == written_in_place else 1)

                return run

        return Kernel()


def inside_operators() -> dict[str, Counter]:
    """Return the bytes inside each of our operators, at the batch's sizes."""

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    found = {}
    counter = Inside()
    loss_triton.loss_kernel, kernel = counter.launch(0), loss_triton.loss_kernel

    def add_product(total, a, b):  # what runs on a GPU, where the total is read and written
        counter.bytes["products"] += sum(t.numel() * t.itemsize for t in (total, total, a, b))

    loss_triton._add_product = add_product
    with counter:
        loss_triton.head_loss_sum._init_fn(
            empty(B * T, C), empty(V, C, dtype=torch.float32), empty(B * T, dtype=torch.int64), True
        )
    loss_triton.loss_kernel = kernel
    found["gkachat.head_loss.default"] = counter.bytes
    H, D = C // 128, 128
    x, gain, weight = empty(B, T, H, D), empty(H, dtype=torch.float32), empty(4, H, D, dtype=torch.float32)
    inputs, bias = (x, weight, weight, weight, gain), empty(B, T, H, 1, dtype=torch.float32)
    for name, args in (("features", (*inputs, bias, T)), ("features_backward", (x, x, x, *inputs))):
        counter = Inside()
        kernels = ("forward_kernel", "backward_kernel")
        saved = {kernel: getattr(features_triton, kernel) for kernel in kernels}
        for kernel in kernels:
            setattr(features_triton, kernel, counter.launch(-1))
        with counter:
            getattr(features_triton, name)._init_fn(*args)
        for kernel, function in saved.items():
            setattr(features_triton, kernel, function)
        found[f"gkachat.{name}.default"] = counter.bytes
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["head", "softmax", "gka", "gka_conv"])
    parser.add_argument("--plain", action="store_true", help="the reference in the place of our Triton kernels")
    parser.add_argument("--depth", type=int, default=4, help="blocks; every other one has value embeddings")
    options = parser.parse_args()
    inside = inside_operators()
    config.force_disable_caches = True
    if SDPBackend.CUDNN_ATTENTION in sdpa.SDPA_PRIORITY:
        sdpa.SDPA_PRIORITY.remove(SDPBackend.CUDNN_ATTENTION)  # a null GPU cannot run it; bytes are the same
    graphs = watch()
    if options.what == "head":
        x = torch.empty(B * T, C, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(V, C, device="cuda", requires_grad=True)
        targets = torch.zeros(B * T, device="cuda", dtype=torch.long)
        function = loss.head_loss if options.plain else loss_triton.head_loss
        torch.compile(lambda *args: function(*args), fullgraph=True)(x, weight, targets).backward()
    else:
        shape = {
            "depth": options.depth,
            "n_embd": C,
            "head_dim": 128,
            "vocab_size": V,
            "sequence_len": T,
            "window_pattern": "L",
        }
        with torch.device("cuda"):
            model = GPT(GPTConfig(attention=options.what, **shape), torch.bfloat16)
        model.head_loss = loss.HeadLoss("none", "the head is not counted", lambda x, w, t: x.float().mean())
        for block in model.blocks:
            if options.plain and hasattr(block.attn, "features"):
                block.attn.features = features.Features("torch", "plain", features.convolved_features)
        idx = torch.zeros(B, T, dtype=torch.long, device="cuda")
        torch.compile(model, fullgraph=True, dynamic=False)(idx, idx).backward()
    total = Counter()
    for name, graph in zip(("forward", "backward"), graphs, strict=True):
        for operator, counts in inside.items():
            launches = graph[f"{operator} kernels"]
            for kind, size in counts.items():
                graph["products of our operators" if kind == "products" else "our kernels"] += launches * size
        total.update(graph)
        shown = {
            kind: n if kind.endswith(" kernels") and kind != "our kernels" else gigabytes(n)
            for kind, n in graph.items()
        }
        print(json.dumps({"pass": name} | shown))
    pointwise = total["generated"] + total["our kernels"]
    every = pointwise + total["products of our operators"] + total["library"]
    sums = {"pointwise GB": gigabytes(pointwise), "with products GB": gigabytes(every)}
    print(json.dumps(vars(options) | sums))


if __name__ == "__main__":
    main()
