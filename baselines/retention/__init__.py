"""What becomes of the KV of ended turns, one rule a file."""
