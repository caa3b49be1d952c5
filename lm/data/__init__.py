"""Data: sources (files, TFDS, generators), tokenizer, chat format, packing and batches."""
