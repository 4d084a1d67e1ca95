"""Adapters for others: the PEFT file, what each engine reads, and the proof that both say the same."""
