"""Several processes that carry bytes behind one socket, and one that decides for all of them."""
