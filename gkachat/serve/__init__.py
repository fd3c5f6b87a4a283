"""A server for trained runs: a batch that many clients share, OpenAI's HTTP interface, and a page."""
