"""Matplotlib figures and drawing."""
