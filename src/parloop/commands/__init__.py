"""One file for each verb of the command line: its options, and the function of parloop that does it. cli.py knows them by name."""
