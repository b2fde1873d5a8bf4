"""Hugging Face models: configuration and composition, one folder per architecture."""
