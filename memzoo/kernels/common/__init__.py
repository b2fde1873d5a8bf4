"""Pieces that several operators share: argument checks, choice of implementation, packed sequences, launch tables."""
