"""A run's folder: states, metrics, locks, and what a run is known by."""
