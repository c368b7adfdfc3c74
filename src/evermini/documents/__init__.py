"""Files to texts: what a path, folder, glob or run of bytes holds, ready for a prompt.

    read_document(data, "report.pdf")          bytes -> Document, whoever has them (command line, HTTP)
    collect(["src", "docs/*.md", "-"], ...)    paths, folders and globs -> Documents and what was skipped, with reasons

`sniff.py` tells formats; `read.py`, `office.py` and `html.py` read them. `walk.py` knows ignore files and globs,
`collect.py` policies (what is too large, what is named twice); `sizes.py` says which folders are the large ones.
"""

from evermini.documents.collect import STDIN, Collection, Limits, Skipped, collect, read_file
from evermini.documents.read import Document, PageReader, read_document
from evermini.documents.sniff import is_image, kind_of

__all__ = [
    "STDIN",
    "Collection",
    "Document",
    "Limits",
    "PageReader",
    "Skipped",
    "collect",
    "is_image",
    "kind_of",
    "read_document",
    "read_file",
]
