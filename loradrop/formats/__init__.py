"""Adapters for others: the PEFT file, how engines read it, and the proof that all say the same."""
