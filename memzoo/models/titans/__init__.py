"""Titans: a neural memory alone (LMM), or with attention as context (MAC), as gate (MAG) or as layer (MAL)."""
