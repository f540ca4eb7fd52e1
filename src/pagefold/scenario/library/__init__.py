"""Own the scenarios that ship with the program: what same-page merging does, one small function for each thing it does."""
