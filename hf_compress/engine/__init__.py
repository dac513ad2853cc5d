"""Signals, budgets, layout, application, books, undo: one module per stage, no architecture and no method in it."""
