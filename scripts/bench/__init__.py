"""What the bench scripts time. They import it after they have read their options, since it imports torch."""
