"""Claims of papers as values: what is run, how it is judged, and what came out."""
