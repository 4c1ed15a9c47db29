"""Static DAG schedulers, one rule a file."""
