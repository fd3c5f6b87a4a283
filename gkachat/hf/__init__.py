"""Export to Hugging Face transformers. configuration_gkachat.py and modeling_gkachat.py travel with the weights."""
