"""Text, tokenizer and needle documents: what training and scoring share."""

from .documents import NeedleDocuments, needle_documents
from .niah import make_sample, needle_samples
from .text import load_tokenizer, prose, tokenizer_path

__all__ = ["NeedleDocuments", "load_tokenizer", "make_sample", "needle_documents", "needle_samples", "prose", "tokenizer_path"]
