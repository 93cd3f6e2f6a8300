"""Decoding and scoring by the published protocols."""
