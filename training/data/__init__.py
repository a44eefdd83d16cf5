"""What a teacher or a generator made, kept on disk."""
