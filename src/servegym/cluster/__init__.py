"""The cluster simulator: the compiled core and the plain reference."""
