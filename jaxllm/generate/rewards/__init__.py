"""Rewards as functions of a completion's row: answers (verifiers), text (form), combine (weights, time limits, failures)."""
