"""What is decided, on what, by which rules, and what counts: one problem like the other."""
