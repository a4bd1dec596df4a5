"""What a new machine or cluster runs before its first step: every layout on tiny models."""
