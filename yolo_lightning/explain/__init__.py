"""Explanation of the loss of one image, as data, text and a figure."""
