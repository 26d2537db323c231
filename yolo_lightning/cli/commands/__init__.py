"""All commands except `fit`, `validate` and `test`."""
