"""Variants of ``dart``."""

FACTORY = {}
