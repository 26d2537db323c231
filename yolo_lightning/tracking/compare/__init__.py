"""Comparison of MLflow runs: metrics, tables and figures."""
