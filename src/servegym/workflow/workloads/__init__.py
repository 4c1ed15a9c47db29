"""Workloads of jobs: agentic LLM workflows, training dataflows, kernel graphs and plain DAGs."""
