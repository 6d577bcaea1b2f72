"""`mla-backend doctor`: what this machine would use for a model, why, and what to change where it would not work."""
