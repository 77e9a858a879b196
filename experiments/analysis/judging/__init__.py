"""From numbers and claims to verdicts; what is not judged yet, and what would settle it."""
