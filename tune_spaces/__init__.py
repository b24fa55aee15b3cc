"""Declarations of searches; nothing here runs anything."""
