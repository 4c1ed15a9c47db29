"""Workflows: DAGs of tasks on heterogeneous devices, their files, schedules and bounds."""
