"""Rules that say which requests move to another replica while they wait or decode."""
