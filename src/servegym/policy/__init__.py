"""What a policy sees and how it answers: the observation contract and the `Policy` protocol."""
