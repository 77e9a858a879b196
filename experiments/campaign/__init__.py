"""Many runs: which are asked for, how far each is, who makes them, what they say."""
