"""Methods that act in the cache stage."""
