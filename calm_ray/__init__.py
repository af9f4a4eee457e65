"""Train language models together, over the internet, with whoever brings a GPU."""

__version__ = "0.1.0"
