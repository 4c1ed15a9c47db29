"""The simulator scored against real engines: replayed runs and published measurements."""
