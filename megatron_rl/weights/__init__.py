"""Weights on the move: names and layouts of every tensor, Hugging Face folders, and the push to the engine."""
