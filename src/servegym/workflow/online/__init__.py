"""Jobs that arrive over time: the compiled simulator, its plain reference and online policies."""
