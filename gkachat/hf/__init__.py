"""Export to Hugging Face transformers. The files that end in _gkachat.py travel with the weights."""
