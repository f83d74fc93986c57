"""Cupel."""
