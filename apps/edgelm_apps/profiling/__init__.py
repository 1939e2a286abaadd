"""Profiling across budgets: a workload in child processes, what it measured, and a page that shows it."""
