"""What a run sees of its student: measures, previews, progress."""
