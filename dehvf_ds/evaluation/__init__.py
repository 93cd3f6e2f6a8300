"""Answers of a trained model and their scores: after a run, in the middle of one, from the shell."""
