"""The training loop, its optimizer, its metrics and what it saves."""
