"""Figures and drawing."""
