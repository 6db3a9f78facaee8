"""Weights as products of smaller ones: one file a decomposition, and what they share."""
