"""Files, images, seeds, processes and statistics, each in one place."""
