"""From `depth` to a training run: horizon, batch, learning rates and weight decay (those of nanochat, mid 2026).

The reference point of all scaling is the softmax model of depth 12, for both attentions: equal horizons then give equal
batches, learning rates and weight decay, and a comparison differs in the attention alone.
"""

import dataclasses
import math
from typing import Any

from gkachat.config import Config, ConfigError, GPTConfig
from gkachat.model.stats import model_stats, token_budget

REFERENCE_DEPTH = 12
REFERENCE_BATCH = 2**19  # tokens
REFERENCE_CHANNELS = 768
BATCH_EXPONENT = 0.383  # the best batch grows with horizon^0.383 (Power Lines, arXiv 2505.13738)
REFERENCE_WEIGHT_DECAY = 0.28

MOMENTUM_START, MOMENTUM_HIGH, MOMENTUM_END, MOMENTUM_STEPS = 0.85, 0.97, 0.90, 400


def resolve(config: Config, world_size: int = 1) -> Config:
    """Fill in every derived value that was not set by hand. The batch is rounded up to whole rows.

    Raises ConfigError when these rows cannot be shared out evenly over `world_size` processes.
    """
    train, optim, model = config.train, config.optim, config.model
    softmax = dataclasses.replace(model, attention="softmax")
    baseline_tokens = train.baseline_tokens or round(train.tokens_per_param * model_stats(softmax).scaling_params)
    total_tokens = train.total_tokens or round(token_budget(train.protocol, model, baseline_tokens))

    reference = GPTConfig(
        depth=REFERENCE_DEPTH,
        vocab_size=model.vocab_size,
        sequence_len=model.sequence_len,
        window_pattern=model.window_pattern,
    )
    reference_tokens = train.tokens_per_param * model_stats(reference).scaling_params
    batch = train.total_batch_size
    if batch is None:
        ideal = REFERENCE_BATCH * (total_tokens / reference_tokens) ** BATCH_EXPONENT
        batch = 2 ** round(math.log2(ideal))
    rows = -(-batch // model.sequence_len)
    if rows % world_size:
        sizes = ", ".join(str(size) for size in range(1, min(rows, 1024) + 1) if rows % size == 0)
        even = -(-rows // world_size) * world_size * model.sequence_len
        raise ConfigError(
            [
                f"train.total_batch_size: given {batch:,} tokens, {rows} rows, which {world_size} processes cannot "
                f"share evenly: start as many as one of {sizes}, or set it to {even}"
            ]
        )
    batch = rows * model.sequence_len

    def default(value: float | None, derived: float) -> float:
        return derived if value is None else value

    batch_scale = math.sqrt(batch / REFERENCE_BATCH)
    decay = REFERENCE_WEIGHT_DECAY * batch_scale * reference_tokens / total_tokens
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, name=config.run_name),
        train=dataclasses.replace(
            train, baseline_tokens=baseline_tokens, total_tokens=total_tokens, total_batch_size=batch
        ),
        optim=dataclasses.replace(
            optim,
            lr_scale=default(optim.lr_scale, batch_scale),
            adam_scale=default(optim.adam_scale, (model.n_embd / REFERENCE_CHANNELS) ** -0.5),
            weight_decay=default(optim.weight_decay, decay),
        ),
    )


def tuning(tree: dict[str, Any], base: str) -> None:
    """Make of a run's config one that tunes its model on conversations: its batch and learning rate, which falls to
    nothing, and no decay; how long follows from the conversations."""
    kept = ("total_batch_size", "device_batch_size", "recompute_blocks", "eval_tokens", "clip_norm", "max_skipped")
    tree["train"] = {name: value for name, value in tree["train"].items() if name in kept}
    tree["train"] |= {"warmup_steps": 10, "warmdown_fraction": 1.0, "final_lr_fraction": 0.0}
    tree["optim"] |= {"weight_decay": 0.0}
    tree["run"]["name"], tree["chat"] = f"{base}_chat", {"base": base}


def facts_of(config: GPTConfig) -> dict[str, str]:
    """What tuning teaches a model to say about itself."""
    return {
        "attention": {"gka": "Gaussian kernel", "gka_plus": "Gaussian kernel"}.get(config.attention, config.attention),
        "parameters": f"{model_stats(config).params['total']:,}",
        "depth": str(config.depth),
    }


def n_steps(config: Config) -> int:
    """Steps of a resolved config."""
    return max(1, round(config.train.total_tokens / config.train.total_batch_size))


def lr_multiplier(step: int, config: Config) -> float:
    """Linear warm-up, a plateau, warm-down to a final share."""
    train, steps = config.train, n_steps(config)
    warm_up = (step + 1) / train.warmup_steps if step < train.warmup_steps else 1.0
    down = warmdown(step, config)
    if train.warmdown_shape == "cosine":
        down = (1 - math.cos(math.pi * down)) / 2
    return warm_up * (1 - (1 - train.final_lr_fraction) * down) if steps > 1 else 1.0


def warmdown(step: int, config: Config) -> float:
    """How far a step is into the warm-down, 0 to 1."""
    steps = n_steps(config)
    length = round(config.train.warmdown_fraction * steps)
    return 0.0 if step < steps - length else (step - (steps - length) + 1) / length


def decay_multiplier(step: int, config: Config) -> float:
    """Weight decay falls in a straight line from the first step to nothing after the last."""
    return 1 - step / n_steps(config) if config.optim.decay_schedule else 1.0


def muon_momentum(step: int, config: Config) -> float:
    """0.85 rising to 0.97 over 400 steps, and falling to 0.90 over the warm-down; or the one that was set."""
    if config.optim.momentum is not None:
        return config.optim.momentum
    risen = MOMENTUM_START + (MOMENTUM_HIGH - MOMENTUM_START) * min(1.0, step / MOMENTUM_STEPS)
    return risen + (MOMENTUM_END - risen) * warmdown(step, config)
