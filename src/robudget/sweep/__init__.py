"""Many recipes: a study expands to them, and a sweep runs what is not done yet, on this machine or on a cluster."""
