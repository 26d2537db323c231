"""What the loss computes for one image, as numbers, text and a picture."""
