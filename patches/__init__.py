"""Where the tensors are in each architecture: one file each, imported as `hf_compress.patches`."""

if __name__ != "hf_compress.patches":
    raise ImportError("import hf_compress.patches, not patches: the folder is a part of the hf_compress package")
