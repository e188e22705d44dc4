"""The command line: finding a command, running it, and turning errors into one line."""
