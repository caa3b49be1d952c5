"""From files, TFDS and generators to batches: tokenizer, chat, sources, packing, feeds."""
