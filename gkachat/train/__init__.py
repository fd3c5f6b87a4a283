"""Training: schedule, optimizers, trainer, and the tasks that it trains on."""
