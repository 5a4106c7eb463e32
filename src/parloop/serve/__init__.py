"""Serving: the plugin that makes stock vLLM run a PLT, and `parloop serve`."""
