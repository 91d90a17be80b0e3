"""The tables and figures of the Wanda paper (arXiv 2306.11695), a module for each kind of measurement."""
