"""An emulated engine: OpenAI-compatible, with the simulator's scheduler and step times.

`content` says what a prompt's tokens are, `blocks` holds the prefix cache, `replica` is the
scheduler on a clock of its own, `pacer` ties that clock to the wall's, `server` speaks HTTP.
"""
