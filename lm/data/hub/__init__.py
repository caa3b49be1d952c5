"""Tokenizers and chat templates of published models, read from their folders."""
