"""The commands of the `servegym` program, one a file."""
