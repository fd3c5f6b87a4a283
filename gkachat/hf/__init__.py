"""What an exported model carries along: sources that stand alone and need transformers. `gkachat` only copies them."""
