"""What a run leaves on disk: names, formats and records of its folder, written and read here alone."""
