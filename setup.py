"""What setup.cfg cannot say: packages, of which one stands elsewhere, and a README that works on package indices."""

import re
from pathlib import Path

from setuptools import find_packages, setup

REPOSITORY = "https://github.com/hf-compress/hf-compress"


def absolute(text: str) -> str:
    """Markdown whose links to files of this repository point there from anywhere."""

    def link(found: re.Match) -> str:
        shown = "raw" if found[1].startswith("!") else "blob"
        return f"{found[1]}({REPOSITORY}/{shown}/main/{found[2]})"

    return re.sub(r"(!?\[[^\]]*\])\((?!https?:|#)([^)]+)\)", link, text)


setup(
    # patches/ stands beside hf_compress/ and is imported as hf_compress.patches (a link in a checkout)
    packages=sorted({*find_packages(include=["hf_compress", "hf_compress.*"]), "hf_compress.patches"}),
    package_dir={"hf_compress": "hf_compress", "hf_compress.patches": "patches"},
    long_description=absolute(Path(__file__).with_name("README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
