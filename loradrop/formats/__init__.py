"""Adapters on disk: the native file, the PEFT file, and the proof that both say the same."""
