"""The training schedule: token budget, batch, learning rates, weight decay and momentum (nanochat's at 92d63d4).

`resolve` fills in what follows from the depth. `set_hyperparameters` is called before each optimizer step.
The reference point of all scaling is the softmax model of depth 12, whatever the attention. Equal token budgets then
give equal batches, learning rates and weight decay, and a comparison differs in the attention alone.
"""

import dataclasses
import math
from collections.abc import Iterable

import torch

from gkachat.checks import ConfigError
from gkachat.config import Config, GPTConfig
from gkachat.model.stats import model_stats, token_budget

REFERENCE_DEPTH = 12
REFERENCE_BATCH = 2**19  # tokens
REFERENCE_CHANNELS = 768
BATCH_EXPONENT = 0.383  # the best batch grows with the token budget to this power (Power Lines, arXiv 2505.13738)
REFERENCE_WEIGHT_DECAY = 0.28

MOMENTUM_START, MOMENTUM_HIGH, MOMENTUM_END, MOMENTUM_STEPS = 0.85, 0.97, 0.90, 400


def resolve(config: Config, world_size: int = 1) -> Config:
    """Fill in every derived value that was not set by hand. The batch is rounded up to whole rows.

    Raises ConfigError when a step has fewer rows than there are processes.
    """
    train, optim, model = config.train, config.optim, config.model
    softmax = dataclasses.replace(model, attention="softmax")
    derived = train.tokens_per_param * model_stats(softmax).scaling_params
    baseline_tokens = train.baseline_tokens or whole_budget(derived, "train.tokens_per_param", train.tokens_per_param)
    total_tokens = train.total_tokens or max(1, round(token_budget(train.protocol, model, baseline_tokens)))

    reference = GPTConfig(
        depth=REFERENCE_DEPTH,
        vocab_size=model.vocab_size,
        sequence_len=model.sequence_len,
        window_pattern=model.window_pattern,
    )
    reference_tokens = train.tokens_per_param * model_stats(reference).scaling_params
    batch = train.total_batch_size
    if batch is None:
        best = REFERENCE_BATCH * (total_tokens / reference_tokens) ** BATCH_EXPONENT
        batch = 2 ** round(math.log2(best))
    rows = -(-batch // model.sequence_len)
    if rows < world_size:
        raise ConfigError(
            [
                f"train.total_batch_size: given {batch:,} tokens, {rows} rows, fewer than the {world_size} processes: "
                f"start {rows} of them at most, or set it to {world_size * model.sequence_len} or more"
            ]
        )
    batch = rows * model.sequence_len

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
            lr_scale=batch_scale if optim.lr_scale is None else optim.lr_scale,
            width_scale=(model.n_embd / REFERENCE_CHANNELS) ** -0.5 if optim.width_scale is None else optim.width_scale,
            weight_decay=decay if optim.weight_decay is None else optim.weight_decay,
        ),
    )


def whole_budget(tokens: float, option: str, given: float) -> int:
    """Return a derived number of tokens as a whole number, 1 or more.

    Raises ConfigError that names the option where the number is not finite, or has more than 64 bits.
    """
    if not tokens < 2**63:
        raise ConfigError([f"{option}: given {given:g}, which makes {tokens:.3g} tokens, expected fewer than 2^63"])
    return max(1, round(tokens))


def n_steps(config: Config) -> int:
    """Return the number of training steps of a resolved config."""
    return max(1, round(config.train.total_tokens / config.train.total_batch_size))


def set_hyperparameters(optimizers: Iterable[torch.optim.Optimizer], step: int, config: Config) -> None:
    """Set learning rates, and Muon's momentum and weight decay, of all parameter groups for one step."""
    lr, momentum = lr_multiplier(step, config), muon_momentum(step, config)
    weight_decay = decay_multiplier(step, config) * config.optim.weight_decay
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["initial_lr"]
            if "momentum" in group:  # Muon's
                group["momentum"], group["weight_decay"] = momentum, weight_decay


def lr_multiplier(step: int, config: Config) -> float:
    """Return the share of the highest learning rate at a step: linear warm-up, plateau, warm-down to a final share."""
    train, steps = config.train, n_steps(config)
    warm_up = (step + 1) / train.warmup_steps if step < train.warmup_steps else 1.0
    down = warmdown(step, config)
    if train.warmdown_shape == "cosine":
        down = (1 - math.cos(math.pi * down)) / 2
    return warm_up * (1 - (1 - train.final_lr_fraction) * down) if steps > 1 else 1.0


def highest_multiplier(config: Config) -> float:
    """Return the highest `lr_multiplier` of a run: below 1 if the warm-up ends after the run, or in the warm-down."""
    last = min(config.train.warmup_steps, n_steps(config) - 1)  # after the warm-up it only falls
    return max(lr_multiplier(step, config) for step in range(last + 1))


def warmdown(step: int, config: Config) -> float:
    """Return how far a step is into the warm-down: 0 up to its first step, 1 after the last step of the run."""
    steps = n_steps(config)
    length = round(config.train.warmdown_fraction * steps)
    return max(0.0, (step - (steps - length)) / length) if length else 0.0


def decay_multiplier(step: int, config: Config) -> float:
    """Return the share of weight decay at a step: it falls to 0 after the last step, as half a cosine wave."""
    return (1 + math.cos(math.pi * step / n_steps(config))) / 2 if config.optim.decay_schedule else 1.0


def muon_momentum(step: int, config: Config) -> float:
    """Return Muon's momentum at a step: 0.85 rising to 0.97 over 400 steps, then falling to 0.90 over the warm-down.

    A run of fewer steps only rises. `optim.momentum` replaces it with a constant.
    """
    if config.optim.momentum is not None:
        return config.optim.momentum
    if step < MOMENTUM_STEPS:
        return MOMENTUM_START + (MOMENTUM_HIGH - MOMENTUM_START) * step / MOMENTUM_STEPS
    return MOMENTUM_HIGH + (MOMENTUM_END - MOMENTUM_HIGH) * warmdown(step, config)
