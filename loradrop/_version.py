"""The version, for setup.py and for files that record it."""

__version__ = "0.1.0"
