"""Kernel costs: sources, the compiled step cost and its explanation."""
