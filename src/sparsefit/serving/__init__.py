"""What a pruned model gains elsewhere: the runtimes that can run it here, and the files that other programs read."""
