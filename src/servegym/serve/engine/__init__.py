"""An emulated engine: OpenAI-compatible, with the simulator's scheduler and step times.

`content` says what a prompt's tokens are, `core` plays the compiled simulator's engine, `replica`
is that engine on a clock of its own, `pacer` ties that clock to the wall's, `server` speaks HTTP.
"""
