"""Quantised checkpoints: how they are made, kept, and run on CPUs. What vLLM's plugin needs of it (form.py) imports torch alone."""
