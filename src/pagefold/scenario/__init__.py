"""Own scenarios: stories told on a machine, and the hosts that can run them."""
