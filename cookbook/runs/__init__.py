"""What a run leaves on disk: the names, formats and records of a run's folder, written and read here alone."""
