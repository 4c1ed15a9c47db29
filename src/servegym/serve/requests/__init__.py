"""What is known of a request before it is sent: its length, its prefixes, what it follows."""
