"""Detection metrics, error analysis and reports."""
