"""Artifacts on a model Hub: what goes there, the card that explains it, and the requests that carry it."""
