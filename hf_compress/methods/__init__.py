"""One file per method; `hf_compress.registry.methods` imports them all, by which they register themselves."""
