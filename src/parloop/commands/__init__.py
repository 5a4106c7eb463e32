"""One file for each verb of the command line: its options, and the call of parloop's function. cli.py lists them by name."""
