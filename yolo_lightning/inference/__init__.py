"""Loading models and running them on images, videos and streams."""
