"""The `lm` command: one file a command."""
