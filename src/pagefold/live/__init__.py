"""Own live merging: the store, the daemon and its clients. What a worker loads is small; the engine is only in the daemon."""
