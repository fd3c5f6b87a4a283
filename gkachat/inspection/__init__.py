"""Statistics, figures and a web page of what a trained model attends to."""
