"""Own the exploration of small worlds: every interleaving of the shipped engine with what may happen beside it."""
