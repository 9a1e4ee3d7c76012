"""Effective rank of features, where evaluations look for it; a training logs the same number (models/rank.py)."""

from models.rank import effective_rank, singular_values, spectral_entropy

__all__ = ["effective_rank", "singular_values", "spectral_entropy"]
