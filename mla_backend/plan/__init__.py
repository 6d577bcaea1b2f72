"""`mla-backend plan`: what a model's cache takes on GPUs, and what it would take with other attention."""
