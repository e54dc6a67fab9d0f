"""Rewards as functions of a completion's row: answers and code (verifiers), text (form), combine (weights, limits, failures)."""
