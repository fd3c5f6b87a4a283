"""Training: recipe, optimizers, trainer."""
