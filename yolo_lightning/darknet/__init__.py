"""Darknet's files: weights, configurations, names and trees."""
