"""Floor 3: the trainers."""
