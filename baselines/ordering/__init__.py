"""Orders inside an engine: whom to admit first and whom to preempt first, one rule a file."""
