"""Built-in environments, one file each, and the tools that some of them offer; `table.py` lists them by name."""
