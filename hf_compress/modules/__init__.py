"""Modules that several trained methods are built of."""
