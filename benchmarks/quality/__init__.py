"""What caches lose: every method on real models, by the tasks of `cskv evaluate`."""
