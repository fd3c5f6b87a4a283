"""Entry points: each parses, calls the library and prints."""
