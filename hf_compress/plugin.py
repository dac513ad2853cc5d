"""Methods and adapters in a file of one's own, for the command line; in Python the file is simply imported."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path

from hf_compress import registry

FILES: dict[Path, str] = {}  # those that were read, and the digests of what they held: it acts on answers


def load(path: Path) -> None:
    """Run a file of Python, which registers its methods and defines its adapters; once, however often it is named.

    Raises:
        ValueError: there is no such file, or it fails; what it had registered until then is forgotten.
    """
    file = path.resolve()
    if file in FILES:
        return
    if not file.is_file() or file.suffix != ".py":
        raise ValueError(f"plugin={str(path)!r} must be a file of Python (.py) with methods or adapters")
    before = registry.methods()  # names of the package come first: a file that takes one is told so
    source = file.read_bytes()
    name = f"hf_compress_plugin_{file.stem}_{len(FILES)}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script that ends the process would end the command without a word
        del sys.modules[name]
        registry.forget(set(registry.methods()) - set(before))
        raise ValueError(f"plugin={str(path)!r} cannot be read: {type(error).__name__}: {error}") from error
    FILES[file] = hashlib.sha256(source).hexdigest()[:16]
