"""`fit`: two runs of transformers' Trainer, and the decision between them; and the same as a
callback in a Trainer of one's own.
"""
