"""Pictures and tables of what a trained model attends to."""
