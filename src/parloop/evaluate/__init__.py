"""The paper's benchmarks, each run by its own tool with one command, per loop count."""
