"""Tests of hf_compress."""
