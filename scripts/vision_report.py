r"""Compare trained image classifiers: parameters, and accuracies with their spread over seeds.

for seed in 0 1 2 3 4; do for attention in softmax gka; do
    python -m scripts.vision_train configs/vision_digits.toml --model.attention $attention \
        --run.seed $seed --run.name digits_${attention}_$seed
done; done
python -m scripts.vision_report digits_softmax_{0..4} digits_gka_{0..4} --out results/vision_digits
"""

import argparse
import os
import statistics
from collections import defaultdict

from gkachat.vision_config import ViTConfig
from scripts.cli import run

COLUMNS = {
    "": "{attention}",
    "parameters": "{params:,}",
    "of the first": "{ratio:.3f}",
    "FLOPs an image": "{flops_per_image:.3g}",
    "top-1, mean": "{top1:.4f}",
    "standard deviation": "{spread:.4f}",
    "lowest": "{low:.4f}",
    "highest": "{high:.4f}",
    "val loss, mean": "{loss:.4f}",
    "seeds": "{seeds}",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.vision_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", help="names or directories of runs")
    parser.add_argument("--out", type=os.path.expanduser, help="write OUT.json and OUT.md")
    options = parser.parse_args()
    import torch

    from gkachat.benchmark import publish, table
    from gkachat.checkpoint import find_run, model_config, open_checkpoint
    from gkachat.config_file import kind_of
    from gkachat.model.vit import model_stats
    from gkachat.train.metrics import read_metrics

    runs_of: dict[ViTConfig, list[dict]] = defaultdict(list)
    for name in options.runs:
        run_dir = find_run(name)
        meta = open_checkpoint(run_dir)[1]
        if (kind := kind_of(meta["config"])) != "image model":
            raise ValueError(f"{run_dir}: given a {kind}, which scripts.compare compares; expected an image model")
        final = [r for r in read_metrics(run_dir) if r["kind"] == "eval" and r["step"] == meta["n_steps"]]
        if not final or "val_top1" not in final[0]:
            raise ValueError(
                f"{run_dir}: no accuracy at its last step, {meta['n_steps']}: expected a run fully trained"
            )
        figures = final[0] | {"name": run_dir.name, "seed": meta["config"]["run"]["seed"], "version": meta["version"]}
        runs_of[model_config(meta, ViTConfig)].append(figures)
    rows: list[dict] = []
    for config, runs in runs_of.items():
        stats, top1 = model_stats(config), [r["val_top1"] for r in runs]
        params = stats.params["total"]
        rows.append(
            {
                "attention": config.attention,
                "params": params,
                "ratio": params / (rows[0]["params"] if rows else params),
                "flops_per_image": stats.flops_per_token * config.sequence_len,
                "top1": statistics.mean(top1),
                "spread": statistics.stdev(top1) if len(top1) > 1 else None,
                "low": min(top1),
                "high": max(top1),
                "loss": statistics.mean(r["val_loss"] for r in runs),
                "seeds": " ".join(str(r["seed"]) for r in runs),
                "runs": runs,
            }
        )
    trained_by = ", ".join(sorted({r["version"] for runs in runs_of.values() for r in runs}))
    title = f"Image classifiers over seeds, trained at commit {trained_by}"
    publish(title, {"rows": rows}, table(rows, COLUMNS), torch.device("cpu"), options.out)


if __name__ == "__main__":
    run(main)
