"""Pictures of what a method kept: overlays, curves, reports."""
