"""Pure functions over tensors, each proved once by a test with numbers."""
