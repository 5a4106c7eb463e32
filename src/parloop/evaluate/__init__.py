"""The benchmarks of the paper, each by its own tool, one command each, per loop count."""
