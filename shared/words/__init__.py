"""Which words of a prompt carry its score, and which edits lower it."""
