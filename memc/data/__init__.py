"""Text for everything that uses it: read, tokenised once, cut into packed sequences. Imports no torch."""

from memc.data.cache import read_tokens
from memc.data.corpus import Batch, Corpus, Sequences
from memc.data.ids import holds_ids, read_ids
from memc.data.sources import read_documents, read_lines, require_file, source_digest
from memc.data.stream import TokenStream
from memc.data.tokens import tokenize

__all__ = [
    "Batch",
    "Corpus",
    "Sequences",
    "TokenStream",
    "holds_ids",
    "read_documents",
    "read_ids",
    "read_lines",
    "read_tokens",
    "require_file",
    "source_digest",
    "tokenize",
]
