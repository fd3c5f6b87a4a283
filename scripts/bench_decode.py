"""Time decoding with every attention, with a cache and with a loop that runs the whole context for each token.

python -m scripts.bench_decode --depth 12 --tokens 1024
python -m scripts.bench_decode --depth 20 --tokens 128 1024 2048 --batch 1 8 64 --compile --out results/h200_decode
"""

from gkachat.config import ATTENTIONS, GPTConfig
from scripts.cli import benchmark_parser, parse_benchmark, positive, run


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--depth", type=positive, default=4, help="layers")
    parser.add_argument("--n-embd", type=positive, help="channels; by default 64 per layer")
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 8], help="rows that decode together")
    parser.add_argument("--tokens", type=positive, nargs="+", default=[1024], help="tokens of context")
    parser.add_argument("--vocab-size", type=positive, default=32_768, help="tokens in the vocabulary")
    parser.add_argument("--int8", action="store_true", help="keep matrices as int8")
    options, device, dtype = parse_benchmark(parser)
    import torch

    from gkachat.benchmark import measured_peaks, publish, table
    from gkachat.inference.quantize import for_inference
    from gkachat.model.gpt import GPT
    from scripts.bench.decode import COLUMNS, measure

    models = {}
    for attention in ATTENTIONS:
        torch.manual_seed(0)
        config = GPTConfig(
            depth=options.depth, attention=attention, vocab_size=options.vocab_size, n_embd=options.n_embd,
            sequence_len=max(*options.tokens, 2) + 1,
        )  # fmt: skip
        with device:
            models[attention] = for_inference(GPT(config, dtype), dtype, options.int8)
    _, bandwidth = measured_peaks(device, dtype)
    rows = [
        row for tokens in options.tokens for batch in options.batch
        for row in measure(models, tokens, batch, options.rounds, bandwidth, options.compile)
    ]  # fmt: skip
    print(f"bandwidth is relative to {bandwidth / 1e9:,.1f} GB/s, that of a large copy")
    kernels = {name: model.blocks[0].attn.decode_kernel for name, model in models.items()}
    for name, kernel in kernels.items():
        print(f"{name}: {kernel.name} ({kernel.reason})")
    result = {
        "dtype": str(dtype), "compile": options.compile, "int8": options.int8,
        "kernels": {name: kernel.name for name, kernel in kernels.items()},
        "bytes_per_second": bandwidth, "rows": rows,
    }  # fmt: skip
    publish("Decoding, timed", result, table(rows, COLUMNS), device, options.out)


if __name__ == "__main__":
    run(main)
