"""Models as graphs for other runtimes, and as Darknet's files."""
