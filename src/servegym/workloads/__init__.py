"""Request streams: trace readers, generators, length prediction and fits."""
