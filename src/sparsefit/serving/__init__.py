"""Speed of a pruned model in several runtimes, and export to other formats."""
