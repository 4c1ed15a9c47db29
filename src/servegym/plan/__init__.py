"""Which fleet is the cheapest that keeps service levels on a trace."""
